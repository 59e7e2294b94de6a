"""Sizes of zero: what torch computes there, forward and backward, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import derivatives

from effens_kernels import grouped_linear, multihead_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.ops.multihead_linear import reference as heads_reference
from effens_kernels.testing import LinearCase

SIZES = [s for s in itertools.product((0, 2), repeat=4) if 0 in s]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "-".join(f"{n}{v}" for n, v in zip("EBIO", s)))


@sizes
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_empty_sizes(size, shared, bias, runner, seed):
    for activation in ACTIVATIONS:
        case = LinearCase(*size, shared=shared, bias=bias, activation=activation)
        inputs = case.inputs_for(torch.float32, runner.device, seed)
        grad = torch.randn(size[0], size[1], size[3], device=runner.device)
        expected = derivatives(reference.grouped_linear, inputs, grad, activation=activation)
        actual = derivatives(grouped_linear, inputs, grad, activation=activation, backend=runner.backend)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_inputs_give_the_activated_bias(activation, runner):
    """As torch.nn.functional.linear with I = 0; and memory of results is written, not left as it was."""
    x, weight, bias = torch.ones(2, 3, 0), torch.ones(2, 4, 0), torch.randn(2, 4)
    x, weight, bias = (t.to(runner.device) for t in (x, weight, bias))
    y = grouped_linear(x, weight, bias, activation=activation, backend=runner.backend)
    expected = ACTIVATIONS[activation].apply(bias)[:, None].expand(2, 3, 4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_sums_over_nothing_are_zero(runner):
    """B = 0: weight and bias gradients; O = 0: the input gradient."""
    for sizes, shared in itertools.product([(2, 0, 3, 4), (2, 3, 4, 0), (0, 3, 4, 5)], (False, True)):
        case = LinearCase(*sizes, shared=shared)
        inputs = case.inputs_for(torch.float32, runner.device)
        grad = torch.ones(sizes[0], sizes[1], sizes[3], device=runner.device)
        for name, value in derivatives(grouped_linear, inputs, grad, backend=runner.backend).items():
            assert torch.equal(value, torch.zeros_like(value)), (name, sizes, shared)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (0, 2, 2, 3), (2, 0, 2, 3), (2, 2, 0, 3)], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_heads(shape, rows):
    inputs = torch.randn(rows, shape[-1]), torch.randn(shape), torch.randn(shape[:-1])
    expected = heads_reference.multihead_linear(*inputs)
    grad = torch.randn_like(expected)
    actual = derivatives(multihead_linear, inputs, grad)
    for name, value in derivatives(heads_reference.multihead_linear, inputs, grad).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", [(0, 2), (0, 1), (1, 2), (2,)], ids=["x+bias", "x+weight", "weight+bias", "bias"])
def test_sums_over_nothing_are_written(wanted, activation):
    """Whatever gradients are asked for, and whatever the memory held before."""
    inputs = torch.randn(2, 0, 17), torch.randn(2, 5, 17), torch.randn(2, 5)
    leaves = [inputs[n].requires_grad_() for n in wanted]
    y = grouped_linear(*inputs, activation=activation, backend="cpu")
    for size in range(1, 200):
        torch.full((size,), float("nan"))
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves))
