"""torch.func: vmap, grad, jacrev, functional_call and their compositions equal loops over the same calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import ARGUMENTS
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

from effens_kernels import grouped_linear, multihead_linear, nn
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.testing import LinearCase

NAMES = ARGUMENTS[3]
SIZE = 3  # of mapped axes
# Where the mapped axis of x, weight and bias is; None: not mapped.
IN_DIMS = [dims for dims in itertools.product((None, 0, -1), repeat=3) if dims != (None,) * 3]
in_dims = pytest.mark.parametrize("in_dims", IN_DIMS, ids=lambda d: "-".join(f"{n}:{p}" for n, p in zip("xwb", d)))
rows = pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
activations = pytest.mark.parametrize("activation", [None, "relu", "gelu"])  # saves nothing, y, z


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def mapped_inputs(dims, seed: int, shared: bool) -> list[Tensor]:
    inputs = LinearCase(2, 5, 4, 3, shared=shared).inputs_for(torch.float64, seed=seed)
    draw = [t if d is None else torch.randn(SIZE, *t.shape, dtype=t.dtype) for t, d in zip(inputs, dims)]
    return [t if d is None else t.movedim(0, d) for t, d in zip(draw, dims)]


def loop(call, dims, inputs):
    """What vmap means."""
    results = [call(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims))) for i in range(SIZE)]
    return torch.stack(results) if isinstance(results[0], Tensor) else tuple(map(torch.stack, zip(*results)))


def ours(activation):
    return lambda x, weight, bias=None: grouped_linear(x, weight, bias, activation=activation, backend="cpu")


def oracle(activation):
    return lambda x, weight, bias=None: reference.grouped_linear(x, weight, bias, activation)


def loss(call):
    """A scalar in which each output has a weight of its own."""

    def value(*inputs):
        y = call(*inputs)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return value


# ------------------------------------------------------------------------------------------------------------ vmap


@in_dims
@rows
@activations
def test_vmap(in_dims, shared, activation, seed):
    inputs = mapped_inputs(in_dims, seed, shared)
    close(vmap(ours(activation), in_dims)(*inputs), loop(oracle(activation), in_dims, inputs))


@in_dims
@rows
@activations
def test_vmap_of_grad(in_dims, shared, activation, seed):
    """Gradients of every argument for every mapped instance, mapped arguments and others."""
    inputs = mapped_inputs(in_dims, seed, shared)
    actual = vmap(grad(loss(ours(activation)), argnums=(0, 1, 2)), in_dims)(*inputs)
    expected = loop(grad(loss(oracle(activation)), argnums=(0, 1, 2)), in_dims, inputs)
    for name, a, b in zip(NAMES, actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@in_dims
@rows
def test_grad_of_vmap(in_dims, shared, seed):
    inputs = mapped_inputs(in_dims, seed, shared)
    for argument in range(3):
        close(
            grad(loss(vmap(ours("gelu"), in_dims)), argument)(*inputs),
            grad(lambda *args: loss(lambda *a: loop(oracle("gelu"), in_dims, a))(*args), argument)(*inputs),
        )


@pytest.mark.parametrize("argument", range(3), ids=NAMES)
@rows
@activations
def test_vmap_of_one_gradient(argument, shared, activation, seed):
    """Only one gradient is needed: the others' work is not asked for."""
    dims = (0, 0, 0)
    inputs = mapped_inputs(dims, seed, shared)
    close(
        vmap(grad(loss(ours(activation)), argument), dims)(*inputs),
        loop(grad(loss(oracle(activation)), argument), dims, inputs),
    )


@rows
def test_nested_vmap(shared, seed):
    inputs = LinearCase(2, 5, 4, 3, shared=shared).inputs_for(torch.float64, seed=seed)
    x = torch.randn(3, *inputs[0].shape, dtype=torch.float64)
    weight = torch.randn(4, *inputs[1].shape, dtype=torch.float64)
    actual = vmap(vmap(ours("silu"), (None, 0)), (0, None))(x, weight)
    expected = torch.stack([torch.stack([oracle("silu")(a, b) for b in weight]) for a in x])
    close(actual, expected)


def test_vmap_without_bias(seed):
    inputs = mapped_inputs((0, None, None), seed, False)[:2]
    close(vmap(ours("tanh"), (0, None))(*inputs), loop(oracle("tanh"), (0, None), inputs))


@activations
@rows
def test_vmap_over_empty_batches(activation, shared, seed):
    inputs = [
        torch.randn(SIZE, *t.shape, dtype=t.dtype)
        for t in LinearCase(2, 0, 4, 3, shared=shared).inputs_for(torch.float64)
    ]
    dims = (0, 0, 0)
    assert vmap(ours(activation), dims)(*inputs).shape == (SIZE, 2, 0, 3)
    actual = vmap(grad(loss(ours(activation)), (0, 1, 2)), dims)(*inputs)
    for a, b in zip(actual, loop(grad(loss(oracle(activation)), (0, 1, 2)), dims, inputs)):
        close(a, b)


def test_vmap_over_nothing(seed):
    x, weight, bias = LinearCase(2, 5, 4, 3).inputs_for(torch.float64, seed=seed)
    nothing = x.expand(0, *x.shape)
    assert vmap(ours("relu"), (0, None, None))(nothing, weight, bias).shape == (0, 2, 5, 3)
    assert vmap(grad(loss(ours("relu"))), (0, None, None))(nothing, weight, bias).shape == (0, 2, 5, 4)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, 0), (0, 0, None)], ids=str)
def test_multihead_linear(dims, seed):
    inputs = LinearCase(2, 5, 4, 3, heads=3).inputs_for(torch.float64, seed=seed)
    inputs = [t if d is None else torch.randn(SIZE, *t.shape, dtype=t.dtype) for t, d in zip(inputs, dims)]
    close(vmap(multihead_linear, dims)(*inputs), loop(multihead_linear, dims, inputs))


# ------------------------------------------------------------------------------------------- derivatives of any order


@rows
@activations
def test_grad_of_grad(shared, activation, seed):
    inputs = LinearCase(2, 5, 4, 3, shared=shared).inputs_for(torch.float64, seed=seed)
    for first, second in itertools.product(range(3), repeat=2):

        def twice(call, first=first, second=second):
            squared = lambda *args: call(*args).pow(3).sum()  # noqa: E731
            return grad(lambda *args: grad(squared, first)(*args).pow(2).sum(), second)(*inputs)

        close(twice(ours(activation)), twice(oracle(activation)))


@rows
@activations
def test_jacrev(shared, activation, seed):
    inputs = LinearCase(2, 3, 4, 3, shared=shared).inputs_for(torch.float64, seed=seed)
    for argument in range(3):
        close(jacrev(ours(activation), argument)(*inputs), jacrev(oracle(activation), argument)(*inputs))


def test_hessian_by_jacrev(seed):
    x, weight, bias = LinearCase(2, 3, 4, 2).inputs_for(torch.float64, seed=seed)

    def hessian(call):
        return jacrev(jacrev(lambda x: loss(call)(x, weight, bias)))(x)

    close(hessian(ours("tanh")), hessian(oracle("tanh")))


def test_vjp(seed):
    inputs = LinearCase(2, 3, 4, 2).inputs_for(torch.float64, seed=seed)
    cotangent = torch.randn(2, 3, 2, dtype=torch.float64)
    for actual, expected in zip(*(vjp(f("silu"), *inputs)[1](cotangent) for f in (ours, oracle))):
        close(actual, expected)


def test_ordinary_gradients_flow_through_a_transform(seed):
    """A loss made of torch.func gradients trains the weights by ordinary backward."""
    x, weight, bias = LinearCase(2, 3, 4, 2).inputs_for(torch.float64, seed=seed)
    results = []
    for call in (ours("gelu"), oracle("gelu")):
        parameter = weight.clone().requires_grad_()
        per_row = vmap(grad(lambda row, call=call, w=parameter: call(row[:, None], w, bias).sum()), in_dims=1)(x)
        results.append(torch.autograd.grad(per_row.square().sum(), parameter)[0])
    close(*results)


# ---------------------------------------------------------------------------------------------------------- layers


def test_per_sample_gradients_of_a_model():
    """vmap(grad) over samples, with the parameters passed by functional_call."""
    model = nn.EnsembleMLP(4, [6], 2, num_members=3, activation="silu", dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    samples, targets = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)

    def error(parameters, sample, target):
        return (functional_call(model, parameters, (sample[None],)) - target).square().sum()

    actual = vmap(grad(error), (None, 0, 0))(parameters, samples, targets)
    for i in range(7):
        model.zero_grad()
        (model(samples[i : i + 1]) - targets[i]).square().sum().backward()
        for name, p in model.named_parameters():
            close(actual[name][i], p.grad)


def test_an_ensemble_of_ensembles():
    """torch.func's own way to stack models, over models that are ensembles already."""
    models = [nn.EnsembleMLP(4, [6], 2, num_members=3, dtype=torch.float64) for _ in range(5)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(7, 4, dtype=torch.float64)
    actual = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    close(actual, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap_grad"])
def test_transforms_compile(transform):
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)

    def value(x):
        return grouped_linear(x if x.dim() > 1 else x[None], weight, activation="gelu").square().sum()

    call = {"grad": grad(value), "vmap": vmap(value), "vmap_grad": vmap(grad(value))}[transform]
    close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
