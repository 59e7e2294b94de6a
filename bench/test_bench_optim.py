"""pytest bench/test_bench_optim.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["optim"]))
def test_bench_optim(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["optim"], workload, name)
