"""pytest bench/test_bench_predict.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["predict"]))
def test_bench_predict(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["predict"], workload, name)
