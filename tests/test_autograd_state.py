"""What is kept for backward, to the byte, and the rules of the graph: freeing, reuse, in-place changes."""

from __future__ import annotations

import pytest
import torch
from common import RUNNERS, leaves
from torch.autograd import forward_ad

from effens_kernels import grouped_linear, multihead_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import LinearCase

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
CASE = LinearCase(3, 5, 7, 4)


def inputs_of(seed: int, case: LinearCase = CASE, dtype: torch.dtype = torch.float32) -> list:
    return leaves(case.inputs_for(dtype, seed=seed))


def saved_by(call) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The tensors that autograd keeps while `call` runs, and its result."""
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return kept, y


def memory_of(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


@activations
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.isa in (None, "baseline")], indirect=True, ids=str)
def test_saved_bytes(activation, shared, dtype, runner, seed):
    """x and weight themselves; besides, y itself for relu and tanh, one new [E, B, O] tensor for gelu and silu."""
    case = LinearCase(3, 5, 7, 4, shared=shared)
    x, weight, bias = leaves(case.inputs_for(dtype, runner.device, seed))
    kept, y = saved_by(lambda: grouped_linear(x, weight, bias, activation=activation, backend=runner.backend))
    extra = {None: 0, "relu": y.nbytes, "tanh": y.nbytes, "gelu": y.nbytes, "silu": y.nbytes}[activation]
    assert sum(t.nbytes for t in kept) == x.nbytes + weight.nbytes + extra
    assert sum(t.untyped_storage().nbytes() for t in kept) == x.nbytes + weight.nbytes + extra
    new = {memory_of(t) for t in kept} - {memory_of(t) for t in (x, weight, y)}
    assert len(new) == (activation in ("gelu", "silu"))


def test_saved_bytes_of_heads(seed):
    """The heads fold without a copy: exactly features and weights."""
    x, weight, bias = inputs_of(seed, LinearCase(3, 5, 7, 4, heads=6))
    kept, _ = saved_by(lambda: multihead_linear(x, weight, bias))
    assert {memory_of(t) for t in kept} == {memory_of(x), memory_of(weight)}
    assert sum(t.nbytes for t in kept) == x.nbytes + weight.nbytes


@activations
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_nothing_is_saved_without_gradients(activation, mode, seed):
    x, weight, bias = inputs_of(seed)
    with mode():
        kept, y = saved_by(lambda: grouped_linear(x, weight, bias, activation=activation, backend="cpu"))
    assert kept == []
    assert not y.requires_grad
    constant = [t.detach() for t in (x, weight, bias)]
    kept, y = saved_by(lambda: grouped_linear(*constant, activation=activation, backend="cpu"))
    assert kept == []
    assert y.grad_fn is None


@activations
def test_inference_mode_and_its_tensors_give_the_same_values(activation, seed):
    x, weight, bias = (t.detach() for t in inputs_of(seed))
    expected = grouped_linear(x, weight, bias, activation=activation, backend="cpu")
    with torch.inference_mode():
        made_there = [t.clone() for t in (x, weight, bias)]
        assert torch.equal(grouped_linear(*made_there, activation=activation, backend="cpu"), expected)
    assert torch.equal(grouped_linear(*made_there, activation=activation, backend="cpu"), expected)


@activations
def test_second_backward_needs_retain_graph(activation, seed):
    inputs = inputs_of(seed)
    y = grouped_linear(*inputs, activation=activation, backend="cpu").square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    second = torch.autograd.grad(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs)


@pytest.mark.parametrize("position", [0, 1], ids=["x", "weight"])
def test_changing_a_saved_input_is_an_error(position, seed):
    inputs = inputs_of(seed)
    y = grouped_linear(*inputs, backend="cpu")
    with torch.no_grad():
        inputs[position].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changing_the_bias_is_none(seed):
    """Bias is not saved, as in torch."""
    inputs = inputs_of(seed)
    y = grouped_linear(*inputs, backend="cpu")
    with torch.no_grad():
        inputs[2].mul_(2)
    y.sum().backward()
    assert torch.equal(inputs[2].grad, torch.full((3, 4), 5.0))


@activations
def test_changing_the_result(activation, seed):
    """An error where it is saved (relu, tanh), as in torch; else harmless."""
    inputs = inputs_of(seed)
    expected = torch.autograd.grad(grouped_linear(*inputs, activation=activation, backend="cpu").sum(), inputs)
    y = grouped_linear(*inputs, activation=activation, backend="cpu")
    y.add_(1)
    if activation in ("relu", "tanh"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), inputs), expected))


def test_gradients_accumulate_over_calls(seed):
    """One weight used twice, and .grad that is there already."""
    x, weight, bias = inputs_of(seed, LinearCase(3, 5, 7, 4, shared=True), torch.float64)
    for _ in range(2):
        (
            grouped_linear(x, weight, bias, backend="cpu") + grouped_linear(2 * x, weight, bias, backend="cpu")
        ).sum().backward()
    expected = 2 * 3 * x.detach().sum(0).expand(3, 4, 7)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, torch.full((3, 4), 20.0, dtype=torch.float64))


def test_gradient_of_nothing_is_zero_or_none(seed):
    inputs = inputs_of(seed)
    y = grouped_linear(*inputs, activation="relu", backend="cpu")
    grads = torch.autograd.grad(y[:0].sum(), inputs)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("route", ["dual_numbers", "func.jvp"])
def test_forward_mode_is_right_or_refused(route, seed):
    """A tangent that is silently dropped would be a derivative of zero."""
    x, weight, bias = (t.detach() for t in inputs_of(seed))
    direction = torch.randn_like(x)

    def tangent(backend):
        def call(x):
            return grouped_linear(x, weight, bias, activation="tanh", backend=backend)

        if route == "func.jvp":
            return torch.func.jvp(call, (x,), (direction,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent

    expected = tangent("reference")
    try:
        actual = tangent("cpu")
    except NotImplementedError:
        return
    torch.testing.assert_close(actual, expected)
