"""pytest bench/test_bench_layer_ensemble.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .benchmarking import cases, run
from .contestants import SUITES


@pytest.mark.parametrize(("workload", "name"), cases(SUITES["layer_ensemble"]))
def test_bench_layer_ensemble(benchmark: Callable, workload: Any, name: str) -> None:
    run(benchmark, SUITES["layer_ensemble"], workload, name)
