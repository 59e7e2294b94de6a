"""Every op on every backend equals the float64 oracle, forward and backward, in every dtype and memory layout."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from common import OPS, RUNNERS, Runner, derivatives, name_of, sample

from effens_kernels.testing import DTYPES, Case, MixCase, assert_accurate

BY_INDEX = ("indexed_linear", "ragged_linear")


def affordable(runner: Runner, op: str, case: Case, dtype: torch.dtype) -> bool:
    """What `runner` is asked to compute: the dtypes it implements, and in milliseconds per tile only small cases."""
    if dtype not in runner.dtypes(op):
        return False
    if runner.emulated and op in BY_INDEX and dtype == torch.float16:
        return False  # grouped_linear's kernel of that type, with what the other types show of places in memory
    if not runner.interpreted:
        return True
    if isinstance(case, MixCase):
        return case.rows * case.columns <= 8000 and (dtype == torch.float32 or case.layout == "contiguous")
    small = case.members * case.batch * case.outputs * (case.heads or 1) <= (600 if op in BY_INDEX else 1200)
    if dtype != torch.float32:
        return small and case.activation in ("relu", "gelu") and case.shared and case.x_layout == "contiguous"
    return small and case.x_layout != "offset" and case.weight_layout in ("contiguous", "inner")


def calls(cases: Iterable[tuple[str, Case]], runners: Iterable[Runner]) -> list:
    """Runners of the same call follow each other, and share its oracle."""
    return [
        pytest.param(op, case, dtype, runner, id=f"{op}-{case}-{name_of(dtype)}-{runner}")
        for op, case in cases
        for dtype in DTYPES
        for runner in runners
        if affordable(runner, op, case, dtype)
    ]


def check(op: str, case: Case, dtype: torch.dtype, runner: Runner, seed: int) -> None:
    inputs, grad, exact, composition = sample(op, case, dtype, runner.device, seed)
    actual = derivatives(OPS[op].call, inputs, grad, **case.options(), backend=runner.backend)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_accurate(value, exact[name], composition[name], name, case.terms()[name])


@pytest.mark.parametrize(
    ("op", "case", "dtype", "runner"),
    calls([(op.name, case) for op in OPS.values() for case in op.cases], RUNNERS),
    indirect=["runner"],
)
def test_values_and_gradients(op, case, dtype, runner, session_seed):
    check(op, case, dtype, runner, session_seed)


@pytest.mark.parametrize(
    ("op", "case", "dtype", "runner"),
    calls(
        [(op.name, case) for op in OPS.values() for case in op.large_cases],
        [runner for runner in RUNNERS if not runner.interpreted],
    ),
    indirect=["runner"],
)
def test_values_and_gradients_beyond_one_cache_block(op, case, dtype, runner, session_seed):
    check(op, case, dtype, runner, session_seed)
