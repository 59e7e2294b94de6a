"""pytest bench/test_bench_indexed.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["indexed"]))
def test_bench_indexed_linear(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["indexed"], workload, name)


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["ragged"]))
def test_bench_ragged_linear(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["ragged"], workload, name)
