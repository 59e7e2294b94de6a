"""pytest bench/test_bench_batchensemble.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["batchensemble"]))
def test_bench_batchensemble(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["batchensemble"], workload, name)


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["conv"]))
def test_bench_rank1_conv2d(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["conv"], workload, name)
