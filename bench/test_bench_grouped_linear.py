"""pytest bench/test_bench_grouped_linear.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["layers"]))
def test_bench_grouped_linear(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["layers"], workload, name)
