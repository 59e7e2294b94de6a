"""rank1_linear beyond the values that test_ops checks: any order of derivatives, memory, modes of PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import ARGUMENTS, RUNNERS, derivatives, leaves, runs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from effens_kernels import _dispatch, nn, rank1_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.rank1_linear import reference
from effens_kernels.ops.rank1_linear.autograd import FORM
from effens_kernels.testing import Rank1Case, assert_accurate

NAMES = ARGUMENTS[5]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
some_activations = pytest.mark.parametrize("activation", [None, "relu", "gelu"])  # saves nothing, y, z
rows = pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
biases = pytest.mark.parametrize("bias", ["each", "one", "none"])


def case_of(shared: bool = False, bias: str = "each", activation: str | None = None) -> Rank1Case:
    return Rank1Case(2, 3, 4, 3, shared=shared, bias=bias != "none", shared_bias=bias == "one", activation=activation)


def double_inputs(case: Rank1Case, seed: int) -> list[Tensor | None]:
    """float64 leaves whose pre-activations keep clear of relu's kink."""
    for attempt in itertools.count(seed):
        inputs = case.inputs_for(torch.float64, seed=attempt)
        if reference.rank1_linear(*inputs).abs().min() > 1e-3:
            return leaves(inputs)


def ours(activation=None, backend="cpu"):
    return lambda *inputs: rank1_linear(*inputs, activation=activation, backend=backend)


def oracle(activation=None):
    return lambda *inputs: reference.rank1_linear(*inputs, activation=activation)


def loss(call):
    """A scalar in which each output has a weight of its own."""

    def value(*inputs):
        y = call(*inputs)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return value


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ derivatives


@activations
@rows
@biases
def test_gradcheck_of_both_orders(activation, shared, bias, seed):
    inputs = double_inputs(case_of(shared, bias), seed)
    assert gradcheck(ours(activation), inputs)
    assert gradgradcheck(ours(activation), inputs)


@some_activations
@rows
def test_gradcheck_of_the_registered_op(activation, shared, seed):
    """The route of everything but plain eager calls."""
    inputs = double_inputs(case_of(shared), seed)
    save = activation == "gelu"

    def call(*tensors):
        return FORM.fwd_op(*tensors, activation, save, "cpu")[0]

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@some_activations
def test_third_derivatives(activation, seed):
    inputs = double_inputs(case_of(), seed)

    def third(call):
        first = torch.autograd.grad(loss(call)(*inputs), inputs, create_graph=True)
        second = torch.autograd.grad(
            sum((g * g).sum() for g in first), inputs, create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(sum((g * g).sum() for g in second), inputs, materialize_grads=True)

    close(third(ours(activation)), third(oracle(activation)))


SUBSETS = [(name,) for name in NAMES] + [("r", "s"), ("x", "bias"), ("weight", "r", "s", "bias")]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@rows
def test_only_the_gradients_asked_for(wanted, shared, runner, seed):
    """The same values, whatever else is computed beside them."""
    case = Rank1Case(3, 9, 21, 18, shared=shared, activation="gelu")
    inputs = dict(zip(NAMES, case.inputs_for(torch.float32, runner.device, seed)))
    grad = torch.randn(3, 9, 18, device=runner.device)
    every = derivatives(rank1_linear, list(inputs.values()), grad, activation="gelu", backend=runner.backend)
    some = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    y = rank1_linear(*some.values(), activation="gelu", backend=runner.backend)
    for name, value in zip(wanted, torch.autograd.grad(y, [some[name] for name in wanted], grad)):
        torch.testing.assert_close(value, every[name], rtol=1e-5, atol=1e-5)


@activations
@rows
@pytest.mark.parametrize("runner", [r for r in RUNNERS if r.isa in (None, "baseline")], indirect=True, ids=str)
def test_saved_bytes(activation, shared, runner, seed):
    """The inputs themselves; besides, y itself for relu and tanh, one new [E, B, O] tensor for gelu and silu."""
    inputs = leaves(Rank1Case(3, 5, 7, 4, shared=shared).inputs_for(torch.float32, runner.device, seed))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = rank1_linear(*inputs, activation=activation, backend=runner.backend)
    extra = 0 if activation is None else y.nbytes
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inputs[:4]) + extra
    known = {t.untyped_storage().data_ptr() for t in (*inputs, y)}
    assert len({t.untyped_storage().data_ptr() for t in kept} - known) == (activation in ("gelu", "silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@rows
def test_the_same_bits_every_time_and_right_for_any_number_of_threads(dtype, shared, threads, seed):
    case = Rank1Case(8, 70, 130, 200, shared=shared, activation="tanh")
    inputs = case.inputs_for(dtype, seed=seed)
    grad = torch.randn(8, 70, 200).to(dtype)
    exact = derivatives(reference.rank1_linear, [t.double() for t in inputs], grad.double(), activation="tanh")
    plain = derivatives(reference.rank1_linear, inputs, grad, activation="tanh")
    for count in (1, 2, 3):
        threads(count)
        first, second = (derivatives(rank1_linear, inputs, grad, activation="tanh", backend="cpu") for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
            assert_accurate(value, exact[name], plain[name], name, case.terms()[name])


@pytest.mark.parametrize(("dtype", "runner"), runs(torch.float32, torch.bfloat16), indirect=["runner"])
def test_infinities_and_nans_go_where_they_belong(dtype, runner, seed):
    x, weight, r, s, bias = Rank1Case(3, 5, 17, 9).inputs_for(dtype, runner.device, seed)
    x[1, 2, 3], s[2, 4] = float("nan"), float("inf")
    y = rank1_linear(x, weight, r, s, bias, activation="relu", backend=runner.backend)
    expected = reference.rank1_linear(x, weight, r, s, bias, "relu")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


# ----------------------------------------------------------------------------------------------- PyTorch's other modes


@pytest.mark.parametrize(
    ("activation", "bias", "save", "need"),
    [
        (None, "none", False, (True,) * 5),
        ("relu", "each", False, (True, False, False, True, False)),
        ("gelu", "each", True, (False, True, True, False, True)),
    ],
)
def test_opcheck(activation, bias, save, need, seed):
    inputs = leaves(case_of(bias=bias).inputs_for(seed=seed))
    torch.library.opcheck(FORM.fwd_op, (*inputs, activation, save, "cpu"))
    grad = torch.randn(2, 3, 3, requires_grad=True)
    saved = torch.randn_like(grad).requires_grad_() if activation else torch.empty(0)
    torch.library.opcheck(FORM.bwd_op, (grad, *inputs[:4], saved, activation, *need, "cpu"))


@pytest.mark.parametrize("backend", [None, "cpu"])
@some_activations
def test_compile_with_any_number_of_rows(backend, activation, seed):
    torch._dynamo.reset()
    call = torch.compile(ours(activation, backend), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (5, 6, 9):
        inputs = Rank1Case(3, batch, 7, 4, shared_bias=True).inputs_for(torch.float32, seed=seed)
        grad = torch.randn(3, batch, 4)
        actual, expected = derivatives(call, inputs, grad), derivatives(oracle(activation), inputs, grad)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_export(seed):
    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return rank1_linear(*tensors, activation="relu", backend="cpu")

    inputs = case_of().inputs_for(torch.float32, seed=seed)
    program = torch.export.export(Model(), inputs)
    torch.testing.assert_close(program.module()(*inputs), reference.rank1_linear(*inputs, activation="relu"))
    assert any("rank1_linear_fwd" in str(node.target) for node in program.graph.nodes)


def test_export_with_any_number_of_rows(seed):
    """On both sides of the line beyond which eager calls take torch's composition."""
    layer = nn.BatchEnsembleLinear(256, 256, num_members=2, activation="relu")
    rows = {"input": {0: torch.export.Dim("B", min=2, max=4096)}}
    program = torch.export.export(layer, (torch.randn(8, 256),), dynamic_shapes=rows)
    for batch in (3, 100):
        x = torch.randn(batch, 256)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


SIZE = 3
IN_DIMS = [(0, None, None, None, None), (None, 0, None, None, None), (None, None, 0, 0, None), (-1, None, 0, -1, 0)]
IN_DIMS += [(0, 0, 0, 0, 0), (None, None, None, None, 0)]
in_dims = pytest.mark.parametrize("dims", IN_DIMS, ids=lambda d: "-".join(f"{n}:{p}" for n, p in zip("xwrsb", d)))


def mapped(dims, shared, seed):
    inputs = case_of(shared).inputs_for(torch.float64, seed=seed)
    draw = [t if d is None else torch.randn(SIZE, *t.shape, dtype=t.dtype) for t, d in zip(inputs, dims)]
    return [t if d is None else t.movedim(0, d) for t, d in zip(draw, dims)]


def loop(call, dims, inputs):
    """What vmap means."""
    results = [call(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims))) for i in range(SIZE)]
    return torch.stack(results) if isinstance(results[0], Tensor) else tuple(map(torch.stack, zip(*results)))


@in_dims
@rows
@some_activations
def test_vmap_and_gradients_inside_it(dims, shared, activation, seed):
    inputs = mapped(dims, shared, seed)
    close(vmap(ours(activation), dims)(*inputs), loop(oracle(activation), dims, inputs))
    every = tuple(range(5))
    actual = vmap(grad(loss(ours(activation)), argnums=every), dims)(*inputs)
    close(actual, loop(grad(loss(oracle(activation)), argnums=every), dims, inputs))


@rows
@some_activations
def test_jacobians(shared, activation, seed):
    inputs = [t.detach() for t in double_inputs(case_of(shared), seed)]
    every = tuple(range(5))
    close(jacrev(ours(activation), every)(*inputs), jacrev(oracle(activation), every)(*inputs))


def test_autocast(seed):
    """As torch.nn.functional.linear: the dtype of autocast, from float32 parameters."""
    inputs = leaves(case_of(bias="one").inputs_for(torch.float32, seed=seed))
    with torch.autocast("cpu", torch.bfloat16):
        y = rank1_linear(*inputs, activation="relu", backend="cpu")
    assert y.dtype == torch.bfloat16
    cast = leaves([t.bfloat16() for t in inputs])
    expected = rank1_linear(*cast, activation="relu", backend="cpu")
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), cast)
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(*grads))


# ----------------------------------------------------------------------------------------------------------- dispatch


@pytest.mark.parametrize("batch", [1, 15, 16])
def test_few_rows_are_torchs(batch, seed, monkeypatch):
    """By the stated rule; whatever is chosen, the values are right."""
    inputs = leaves(Rank1Case(2, batch, 256, 256, activation="relu").inputs_for(seed=seed))
    ran = []
    kernel = FORM.kernels("cpu").fwd
    monkeypatch.setattr(FORM.kernels("cpu"), "fwd", lambda *a: (ran.append(True), kernel(*a))[1])
    y = rank1_linear(*inputs, activation="relu")
    assert bool(ran) == (batch >= 16)
    torch.testing.assert_close(y, reference.rank1_linear(*inputs, activation="relu"), rtol=1e-4, atol=1e-4)
    ran.clear()
    with torch.no_grad():
        rank1_linear(*inputs)
    assert bool(ran) == (batch >= 4)
    ran.clear()
    rank1_linear(*inputs, backend="cpu")
    assert ran
    ran.clear()
    rank1_linear(*(t.half() for t in inputs))  # torch's unscaled outputs might leave the range of float16
    assert ran
    sizes = 2, batch, 256, 256
    for training, least in ((True, 16), (False, 4)):
        problem = _dispatch.Problem("rank1_linear", "cpu", torch.float32, sizes, training=training)
        assert _dispatch.select(problem) == ("cpu" if batch >= least else "reference")
