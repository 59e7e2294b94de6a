"""Which way mixture_linear takes, by the stated rule; and that every way gives the same."""

from __future__ import annotations

import pytest
import torch
from common import OPS, derivatives

from effens_kernels import _dispatch, mixture_linear
from effens_kernels.ops.mixture_linear import reference
from effens_kernels.testing import MixtureCase


def chosen(members, templates, batch, size, shared, device="cpu", dtype=torch.float32, has_blocks=True) -> str:
    problem = _dispatch.Problem("mixture_linear", device, dtype, (members, batch, size, size))
    return _dispatch.mixture_route(problem, templates, shared, has_blocks)


def test_the_rule():
    assert chosen(32, 4, 64, 512, shared=True) == "outputs"
    assert chosen(4, 8, 64, 512, shared=True) == "blocks"
    assert chosen(4, 8, 64, 512, shared=True, has_blocks=False) == "weights"
    assert chosen(32, 4, 1, 512, shared=False) == "outputs"
    assert chosen(32, 4, 16, 512, shared=False) == "blocks"
    assert chosen(32, 4, 256, 512, shared=False) == "weights"  # blocks would read too many rows again and again
    assert chosen(4, 4, 1, 16, shared=True) == "blocks"  # too small for the calls that outputs take
    assert chosen(4, 4, 0, 16, shared=True) == "weights"
    assert chosen(32, 4, 16, 512, shared=True, dtype=torch.float16) == "blocks"
    assert chosen(32, 4, 64, 512, shared=True, device="cuda", has_blocks=False) == "outputs"
    assert chosen(32, 4, 1, 512, shared=False, device="cuda", has_blocks=False) == "weights"


@pytest.mark.parametrize(
    ("way", "case"),
    [
        ("outputs", MixtureCase(16, 2, 200, 190, templates=2, activation="relu")),
        ("outputs", MixtureCase(16, 2, 200, 190, shared=True, templates=2, activation="relu")),
        ("blocks", MixtureCase(5, 9, 70, 90, templates=3, activation="relu")),
        ("weights", MixtureCase(32, 70, 190, 200, templates=3, activation="relu")),
    ],
    ids=str,
)
def test_the_way_that_the_rule_says_is_taken(way, case, seed, monkeypatch):
    made, route = [], _dispatch.mixture_route
    monkeypatch.setattr(_dispatch, "mixture_route", lambda *a: (made.append(route(*a)), made[-1])[1])
    inputs = case.inputs_for(seed=seed)
    y = mixture_linear(*inputs, activation="relu", backend="cpu")
    assert made == [way]
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
