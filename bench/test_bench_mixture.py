"""pytest bench/test_bench_mixture.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["mixing"]))
def test_bench_mix_templates(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["mixing"], workload, name)


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["mixture"]))
def test_bench_mixture_linear(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["mixture"], workload, name)


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["mixture_conv"]))
def test_bench_mixture_conv2d(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["mixture_conv"], workload, name)
