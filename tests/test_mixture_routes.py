"""Which way mixture_linear takes, by the stated rule; and that every way gives the same."""

from __future__ import annotations

import pytest
import torch
from common import OPS, derivatives

from effens_kernels import _dispatch, mixture_linear
from effens_kernels.ops.mixture_linear import reference
from effens_kernels.testing import MixtureCase


def chosen(members, templates, batch, size, shared, device="cpu", dtype=torch.float32) -> str:
    problem = _dispatch.Problem("mixture_linear", device, dtype, (members, batch, size, size))
    return _dispatch.mixture_route(problem, templates, shared)


def test_the_rule():
    assert chosen(32, 4, 64, 512, shared=True) == "outputs"
    assert chosen(4, 8, 64, 512, shared=True) == "weights"
    assert chosen(32, 4, 1, 512, shared=False) == "outputs"
    assert chosen(32, 4, 16, 512, shared=False) == "weights"
    assert chosen(4, 4, 1, 16, shared=True) == "weights"  # too small for the calls that it takes
    assert chosen(32, 4, 64, 512, shared=True, dtype=torch.float16) == "weights"
    assert chosen(32, 4, 64, 512, shared=True, device="cuda") == "outputs"
    assert chosen(32, 4, 1, 512, shared=False, device="cuda") == "weights"


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_member"])
def test_outputs_are_mixed_where_the_rule_says(shared, seed, monkeypatch):
    made, route = [], _dispatch.mixture_route
    monkeypatch.setattr(_dispatch, "mixture_route", lambda *a: (made.append(route(*a)), made[-1])[1])
    case = MixtureCase(16, 2, 200, 190, shared=shared, templates=2, activation="relu")
    inputs = case.inputs_for(seed=seed)
    y = mixture_linear(*inputs, activation="relu", backend="cpu")
    assert made == ["outputs"]
    torch.testing.assert_close(y, reference.mixture_linear(*inputs, "relu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["weights", "outputs"])
@pytest.mark.parametrize("case", OPS["mixture_linear"].cases, ids=str)
def test_both_ways_give_the_same(way, case, runner, seed, monkeypatch):
    """In every layout and shape, laid out as the shape rule says."""
    monkeypatch.setattr(_dispatch, "mixture_route", lambda *_: way)
    inputs = case.inputs_for(torch.float32, runner.device, seed)
    wide = [None if t is None else t.double() for t in inputs]
    exact = reference.mixture_linear(*wide, case.activation)
    gradient = torch.randn_like(exact)
    if case.activation == "relu":
        gradient = gradient.masked_fill(exact.abs() < 1e-3, 0)  # where rounding decides which derivative is right
    actual = derivatives(mixture_linear, inputs, gradient.float(), **case.options(), backend=runner.backend)
    expected = derivatives(reference.mixture_linear, wide, gradient, **case.options())
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-3)
    assert actual["x"].stride() == torch.empty_like(inputs[0]).stride() or actual["x"].numel() == 0
