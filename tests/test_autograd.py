"""Derivatives of any order, what is kept for them, and how they behave in PyTorch's autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import ARGUMENTS, derivatives, leaves
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from effens_kernels import grouped_linear, multihead_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.testing import LinearCase

NAMES = ARGUMENTS[3]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
rows = pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])


def double_inputs(case: LinearCase, seed: int) -> list[Tensor | None]:
    """float64 leaves whose pre-activations keep clear of relu's kink, where differences would not be derivatives."""
    for attempt in itertools.count(seed):
        inputs = case.inputs_for(torch.float64, seed=attempt)
        if reference.grouped_linear(*inputs).abs().min() > 1e-3:
            return leaves(inputs)


def on_cpu(activation):
    return lambda x, weight, bias=None: grouped_linear(x, weight, bias, activation=activation, backend="cpu")


def registered(activation, save_preactivation):
    """The op as torch.compile and torch.func see it, with its registered rules."""
    op = torch.ops.effens_kernels.grouped_linear_fwd
    return lambda x, weight, bias=None: op(x, weight, bias, activation, save_preactivation, "cpu")[0]


# -------------------------------------------------------------------------------------- against finite differences


@activations
@rows
@biases
def test_gradcheck(activation, shared, bias, seed):
    inputs = double_inputs(LinearCase(2, 3, 4, 3, shared=shared, bias=bias), seed)
    assert gradcheck(on_cpu(activation), [t for t in inputs if t is not None], check_batched_grad=True)


@activations
@rows
@biases
def test_gradgradcheck(activation, shared, bias, seed):
    inputs = double_inputs(LinearCase(2, 3, 2, 2, shared=shared, bias=bias), seed)
    assert gradgradcheck(on_cpu(activation), [t for t in inputs if t is not None], check_batched_grad=True)


@activations
@pytest.mark.parametrize("save_preactivation", [False, True], ids=["recompute", "save"])
@rows
def test_registered_op(activation, save_preactivation, shared, seed):
    inputs = double_inputs(LinearCase(2, 3, 2, 2, shared=shared), seed)
    assert gradcheck(registered(activation, save_preactivation), inputs)
    assert gradgradcheck(registered(activation, save_preactivation), inputs)


def test_preactivation_is_differentiable(seed):
    """The second result of the registered op, by itself and beside the first."""
    inputs = double_inputs(LinearCase(2, 3, 2, 2), seed)
    op = torch.ops.effens_kernels.grouped_linear_fwd
    assert gradcheck(lambda *args: op(*args, "silu", True, "cpu")[1], inputs)
    assert gradcheck(lambda *args: op(*args, "gelu", True, "cpu"), inputs)
    assert gradgradcheck(lambda *args: op(*args, "gelu", True, "cpu"), inputs)


@pytest.mark.parametrize("case", [LinearCase(2, 3, 4, 2, heads=3), LinearCase(0, 3, 4, 2, heads=3)], ids=str)
def test_multihead_linear(case, seed):
    inputs = leaves(case.inputs_for(torch.float64, seed=seed))
    assert gradcheck(lambda *args: multihead_linear(*args, backend="cpu"), inputs)
    assert gradgradcheck(lambda *args: multihead_linear(*args, backend="cpu"), inputs)


@activations
@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_second_derivatives_equal_the_reference(activation, shared, dtype, seed):
    """A gradient penalty, at sizes beyond one tile, with respect to everything including dL/dy."""
    case = LinearCase(3, 21, 37, 19, shared=shared)

    def penalty(call, dtype):
        inputs = leaves([t.to(dtype) for t in case.inputs_for(torch.float64, seed=seed)])
        generator = torch.Generator().manual_seed(seed)
        grad_y = torch.randn(3, 21, 19, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        first = torch.autograd.grad(call(*inputs), inputs, grad_y, create_graph=True)
        weights = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(dtype) for g in first]
        loss = sum((w * g + g**2).sum() for w, g in zip(weights, first))
        return torch.autograd.grad(loss, [*inputs, grad_y], materialize_grads=True)

    ours = penalty(on_cpu(activation), dtype)
    exact = penalty(lambda *args: reference.grouped_linear(*args, activation), torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, actual, expected in zip((*NAMES, "grad"), ours, exact):
        error, scale = (actual - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"


@rows
def test_third_derivative(shared, seed):
    inputs = double_inputs(LinearCase(2, 2, 3, 2, shared=shared), seed)

    def derivative(call, order):
        value = call(*inputs).pow(2).sum()
        for _ in range(order):
            value = sum(g.pow(2).sum() for g in torch.autograd.grad(value, inputs, create_graph=True))
        return value

    expected = derivative(lambda *args: reference.grouped_linear(*args, "tanh"), 3)
    torch.testing.assert_close(derivative(on_cpu("tanh"), 3), expected, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------- only what is asked for

SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.parametrize("case", [LinearCase(3, 15, 40, 18), LinearCase(3, 15, 40, 18, shared=True)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_subsets_of_gradients(wanted, case, activation, runner, seed):
    if runner.interpreted and activation == "gelu":
        return
    inputs = dict(zip(NAMES, case.inputs_for(torch.float32, runner.device, seed)))
    grad = torch.randn(3, 15, 18, device=runner.device)
    full = derivatives(grouped_linear, tuple(inputs.values()), grad, activation=activation, backend=runner.backend)
    for name in wanted:
        inputs[name].requires_grad_()
    y = grouped_linear(**inputs, activation=activation, backend=runner.backend)
    y.backward(grad)
    for name, t in inputs.items():
        assert (t.grad is not None) == (name in wanted)
        if name in wanted:
            assert torch.equal(t.grad, full[name]), name


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_subsets_of_second_derivatives(wanted, seed):
    """Each path of the second derivative by itself: of dx alone, of db alone, ..."""
    inputs = double_inputs(LinearCase(2, 3, 4, 3), seed)
    named = dict(zip(NAMES, inputs))

    def second(call):
        y = call(*inputs)
        first = torch.autograd.grad(y.pow(3).sum(), [named[n] for n in wanted], create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)

    for activation in ACTIVATIONS:
        expected = second(lambda *args, a=activation: reference.grouped_linear(*args, a))
        for call in (on_cpu(activation), registered(activation, False)):
            for actual, value in zip(second(call), expected):
                torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-12)


def test_unused_input_has_no_gradient(seed):
    x, weight, bias = leaves(LinearCase(2, 3, 4, 3).inputs_for(seed=seed))
    other = torch.zeros(1, requires_grad=True)
    y = grouped_linear(x, weight, bias, backend="cpu")
    grads = torch.autograd.grad(y.sum(), (x, other, weight), allow_unused=True)
    assert grads[1] is None
    assert grads[0].shape == x.shape
    assert grads[2].shape == weight.shape
