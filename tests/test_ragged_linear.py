"""ragged_linear beyond the values that test_ops checks: members of any size, derivatives, memory, modes of PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import RUNNERS, derivatives, leaves, runs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from effens_kernels import grouped_linear, ragged_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.ragged_linear import reference
from effens_kernels.ops.ragged_linear.autograd import FORM
from effens_kernels.testing import RaggedCase, assert_accurate

NAMES = ("x", "weight", "bias")
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
some_activations = pytest.mark.parametrize("activation", [None, "relu", "gelu"])  # saves nothing, y, z
biases = pytest.mark.parametrize("bias", ["each", "one", "none"])
HERE = [r for r in RUNNERS if r.dtypes("ragged_linear")]
on_runners = pytest.mark.parametrize("runner", HERE, indirect=True, ids=str)
in_dtypes = pytest.mark.parametrize(
    ("dtype", "runner"), runs(torch.float32, torch.bfloat16, op="ragged_linear"), indirect=["runner"]
)

OFFSETS = torch.tensor([0, 3, 3, 4, 7])  # 4 members of 3, 0, 1 and 3 rows


def case_of(bias: str = "each", activation: str | None = None) -> RaggedCase:
    return RaggedCase(4, 7, 4, 3, bias=bias != "none", shared_bias=bias == "one", activation=activation)


def double_inputs(case: RaggedCase, seed: int) -> list[Tensor | None]:
    """float64 leaves whose pre-activations keep clear of relu's kink."""
    for attempt in itertools.count(seed):
        inputs = case.inputs_for(torch.float64, seed=attempt)
        if reference.ragged_linear(*inputs, offsets=OFFSETS).abs().min() > 1e-3:
            return leaves(inputs)


def ours(activation=None, backend="cpu", offsets=OFFSETS):
    return lambda *inputs: ragged_linear(*inputs, offsets=offsets, activation=activation, backend=backend)


def oracle(activation=None, offsets=OFFSETS):
    return lambda *inputs: reference.ragged_linear(*inputs, activation, offsets=offsets)


def loss(call):
    """A scalar in which each output has a weight of its own."""

    def value(*inputs):
        y = call(*inputs)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return value


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def ends_of(*rows: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(rows)], dtype=dtype)


def check(inputs, gradient, runner, offsets, activation=None) -> dict[str, Tensor]:
    """Values and gradients against float64, by the rule of the tests; and the values."""
    wide = [None if t is None else t.double() for t in inputs]
    exact = derivatives(oracle(activation, offsets), wide, gradient.double())
    plain = derivatives(oracle(activation, offsets), inputs, gradient)
    found = derivatives(ours(activation, runner.backend, offsets), inputs, gradient)
    rows, (outputs, width) = int(offsets.diff().max()), inputs[1].shape[1:]
    for (name, value), terms in zip(found.items(), (width, outputs, rows, rows)):
        assert_accurate(value, exact[name], plain[name], name, terms)
    return found


# ---------------------------------------------------------------------------------------------------------- offsets

SIZES = {
    "even": (9, 9, 9, 9),
    "first": (36, 0, 0, 0),
    "last": (0, 0, 0, 36),
    "middle": (0, 36, 0, 0),
    "few": (1, 0, 2, 1),
    "growing": (1, 5, 20, 70),
    "one_large": (1, 300, 2, 0),
    "none": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", SIZES)
@in_dtypes
def test_members_of_any_size(name, dtype, runner, seed):
    offsets = ends_of(*SIZES[name], dtype=torch.int32).to(runner.device)
    inputs = RaggedCase(4, sum(SIZES[name]), 33, 21).inputs_for(dtype, runner.device, seed)
    gradient = torch.randn(len(inputs[0]), 21, device=runner.device).to(dtype)
    found = check(inputs, gradient, runner, offsets, "tanh")
    for rows, *of_member in zip(SIZES[name], found["weight"], found["bias"]):
        assert all(bool(t.any()) == (rows > 0) for t in of_member)


@in_dtypes
def test_random_sizes_of_many_members(dtype, runner, seed):
    offsets = ends_of(*torch.randint(5, (61,)).tolist()).to(runner.device)
    inputs = RaggedCase(61, int(offsets[-1]), 17, 9).inputs_for(dtype, runner.device, seed)
    gradient = torch.randn(len(inputs[0]), 9, device=runner.device).to(dtype)
    check(inputs, gradient, runner, offsets, "gelu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("layout", ["stepped", "offset"])
@on_runners
def test_offsets_of_any_layout(layout, dtype, runner, seed):
    """Equal to those of contiguous offsets, to the last bit."""
    inputs = case_of().inputs_for(torch.float32, runner.device, seed)
    plain = OFFSETS.to(runner.device, dtype)
    laid_out = {
        "stepped": torch.stack([plain, torch.full_like(plain, 99)], 1).flatten()[::2],
        "offset": torch.cat([torch.full_like(plain, -7), plain, plain])[5:10],
    }[layout]
    gradient = torch.randn(7, 3, device=runner.device)
    expected, actual = (
        derivatives(ours("relu", runner.backend, offsets), inputs, gradient)
        for offsets in (OFFSETS.to(runner.device), laid_out)
    )
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@on_runners
def test_equal_members_are_grouped_linear(runner, seed):
    x, weight, bias = RaggedCase(4, 36, 17, 9).inputs_for(torch.float32, runner.device, seed)
    gradient = torch.randn(36, 9, device=runner.device)
    offsets = ends_of(*SIZES["even"]).to(runner.device)
    actual = derivatives(ours("gelu", runner.backend, offsets), (x, weight, bias), gradient)
    stacked = x.unflatten(0, (4, 9)), weight, bias
    options = {"activation": "gelu", "backend": runner.backend}
    expected = derivatives(grouped_linear, stacked, gradient.unflatten(0, (4, 9)), **options)
    for name, value in actual.items():
        torch.testing.assert_close(value.view_as(expected[name]), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("rows", [(), (0,), (0, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 4), (0, 4), (3, 0)], ids=str)
@on_runners
def test_empty(inputs, outputs, rows, activation, runner, seed):
    """Nothing is left unwritten, however little there is to write."""
    case, dtype = RaggedCase(len(rows), sum(rows), inputs, outputs), torch.float32
    tensors = case.inputs_for(dtype, runner.device, seed)
    offsets = ends_of(*rows).to(runner.device)
    gradient = torch.randn(sum(rows), outputs, device=runner.device)
    expected = derivatives(oracle(activation, offsets), tensors, gradient)
    for _ in range(2):  # memory that was used before
        [torch.full_like(t, float("nan")) for t in (*tensors, gradient)]
        actual = derivatives(ours(activation, runner.backend, offsets), tensors, gradient)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@in_dtypes
def test_a_member_of_nans_spoils_its_own_rows_alone(dtype, runner, seed):
    x, weight, bias = case_of().inputs_for(dtype, runner.device, seed)
    weight[2, 1, 1] = float("nan")
    offsets = OFFSETS.to(runner.device)
    found = derivatives(ours("relu", runner.backend, offsets), (x, weight, bias), torch.ones_like(x[:, :3]))
    assert found["y"].isnan().nonzero().tolist() == [[3, 1]]
    assert not found["x"][[0, 1, 2, 4, 5, 6]].isnan().any()


# ------------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [(90, 0, 310, 7, 1, 200), (0, 600, 1, 1), (50,) * 12], ids=str)
def test_the_same_bits_for_any_number_of_threads(rows, dtype, isa, threads, seed):
    """However tiles are shared out, also where nearly all are of one member."""
    inputs = RaggedCase(len(rows), sum(rows), 130, 170).inputs_for(dtype, seed=seed)
    gradient = torch.randn(sum(rows), 170).to(dtype)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(derivatives(ours("tanh", offsets=ends_of(*rows)), inputs, gradient))
    for other, name in itertools.product(results[1:], results[0]):
        assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize("needed", [n for k in (1, 2) for n in itertools.combinations(NAMES, k)], ids="+".join)
@on_runners
def test_only_the_gradients_asked_for(needed, runner, seed):
    """The same values, whatever else is computed beside them."""
    inputs = dict(zip(NAMES, case_of().inputs_for(torch.float32, runner.device, seed)))
    offsets, gradient = OFFSETS.to(runner.device), torch.randn(7, 3, device=runner.device)
    every = derivatives(ours("gelu", runner.backend, offsets), list(inputs.values()), gradient)
    some = {name: t.detach().requires_grad_(name in needed) for name, t in inputs.items()}
    y = ours("gelu", runner.backend, offsets)(*some.values())
    for name, value in zip(needed, torch.autograd.grad(y, [some[name] for name in needed], gradient)):
        torch.testing.assert_close(value, every[name], rtol=1e-5, atol=1e-5)


@activations
@pytest.mark.parametrize("runner", [r for r in HERE if r.isa in (None, "baseline")], indirect=True, ids=str)
def test_saved_bytes(activation, runner, seed):
    """The inputs themselves and the offsets; besides, y for relu and tanh, one new tensor for gelu and silu."""
    inputs = leaves(case_of().inputs_for(torch.float32, runner.device, seed))
    offsets, kept = OFFSETS.to(runner.device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = ours(activation, runner.backend, offsets)(*inputs)
    given = [*inputs[:2], offsets]
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in given) + (y.nbytes if activation else 0)
    known = {t.untyped_storage().data_ptr() for t in (*given, y)}
    assert len({t.untyped_storage().data_ptr() for t in kept} - known) == (activation in ("gelu", "silu"))


# ------------------------------------------------------------------------------------------------------ derivatives


@activations
@biases
def test_gradcheck_of_both_orders(activation, bias, seed):
    inputs = double_inputs(case_of(bias), seed)
    assert gradcheck(ours(activation), inputs)
    assert gradgradcheck(ours(activation), inputs)


@some_activations
def test_gradcheck_of_the_registered_op(activation, seed):
    """The route of everything but plain eager calls."""
    inputs = double_inputs(case_of(), seed)

    def call(x, weight, bias):
        return FORM.fwd_op(x, weight, OFFSETS, bias, activation, activation == "gelu", "cpu")[0]

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


def test_second_derivatives_of_the_bias_alone(seed):
    """Where no other factor has a gradient, the bias alone has to find its rows."""
    x, weight, bias = double_inputs(case_of(), seed)

    def second(call):
        (first,) = torch.autograd.grad(call(x.detach(), weight.detach(), bias).square().sum(), bias, create_graph=True)
        return torch.autograd.grad((first**3).sum(), bias)

    close(second(ours("tanh")), second(oracle("tanh")))


# --------------------------------------------------------------------------------------------- PyTorch's other modes


@pytest.mark.parametrize("case", [case_of(), case_of("one"), case_of("none"), RaggedCase(0, 0, 3, 2)], ids=str)
def test_the_reference_without_values_of_offsets(case, seed):
    """As under torch.compile, where it cannot cut x into members."""
    inputs = case.inputs_for(torch.float64, seed=seed)
    offsets = OFFSETS if case.members else ends_of()
    close(reference._by_row(*inputs, offsets), reference.ragged_linear(*inputs, offsets=offsets))


@pytest.mark.parametrize(
    ("activation", "bias", "need"),
    [(None, "none", (True, True, True)), ("relu", "each", (True, False, False)), ("gelu", "each", (False, True, True))],
)
def test_opcheck(activation, bias, need, seed):
    x, weight, bias = leaves(case_of(bias).inputs_for(seed=seed))
    operands = x, weight, OFFSETS.int()
    torch.library.opcheck(FORM.fwd_op, (*operands, bias, activation, activation == "gelu", "cpu"))
    gradient = torch.randn(7, 3, requires_grad=True)
    saved = torch.randn_like(gradient).requires_grad_() if activation else torch.empty(0)
    torch.library.opcheck(FORM.bwd_op, (gradient, *operands, saved, activation, *need, "cpu"))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@some_activations
def test_compile_with_any_number_of_rows(backend, activation, seed):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(ragged_linear, fullgraph=True, dynamic=True, backend=counter)
    for rows in (9, 60, 11):
        case = RaggedCase(4, rows, 7, 4, shared_bias=True, activation=activation)
        inputs, gradient = case.inputs_for(torch.float32, seed=seed), torch.randn(rows, 4)
        actual = derivatives(call, inputs, gradient, **case.options(), backend=backend)
        expected = derivatives(reference.ragged_linear, inputs, gradient, **case.options())
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_export_with_any_number_of_rows(seed):
    class Model(torch.nn.Module):
        def forward(self, x, weight, bias, offsets):
            return ragged_linear(x, weight, bias, offsets=offsets, activation="relu")

    x, weight, bias = case_of().inputs_for(torch.float32, seed=seed)
    shapes = {"x": {0: torch.export.Dim("N", min=2, max=64)}, **dict.fromkeys(("weight", "bias", "offsets"))}
    program = torch.export.export(Model(), (x, weight, bias, OFFSETS), dynamic_shapes=shapes)
    assert any("ragged_linear_fwd" in str(node.target) for node in program.graph.nodes)
    for rows in (7, 3):
        inputs, offsets = (x[:rows], weight, bias), OFFSETS.clamp(max=rows)
        expected = reference.ragged_linear(*inputs, "relu", offsets=offsets)
        torch.testing.assert_close(program.module()(*inputs, offsets), expected)


SIZE = 3
IN_DIMS = [d for d in itertools.product((None, 0, -1), repeat=3) if d != (None,) * 3]
in_dims = pytest.mark.parametrize("dims", IN_DIMS, ids=lambda d: "-".join(f"{n}:{p}" for n, p in zip("xwb", d)))


def mapped(dims, tensors):
    draw = [t if d is None else torch.randn(SIZE, *t.shape, dtype=t.dtype) for t, d in zip(tensors, dims)]
    return [t if d is None else t.movedim(0, d) for t, d in zip(draw, dims)]


def loop(call, dims, inputs):
    """What vmap means."""
    results = [call(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims))) for i in range(SIZE)]
    return torch.stack(results) if isinstance(results[0], Tensor) else tuple(map(torch.stack, zip(*results)))


@in_dims
@some_activations
def test_vmap_and_gradients_inside_it(dims, activation, seed):
    inputs = mapped(dims, case_of().inputs_for(torch.float64, seed=seed))
    close(vmap(ours(activation), dims)(*inputs), loop(oracle(activation), dims, inputs))
    for argnums in ((0, 1, 2), (0,), (1,), (2,)):
        actual = vmap(grad(loss(ours(activation)), argnums=argnums), dims)(*inputs)
        close(actual, loop(grad(loss(oracle(activation)), argnums=argnums), dims, inputs))


@pytest.mark.parametrize("x_dim", [None, 1], ids=["x:None", "x:1"])
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_over_offsets(dim, x_dim, seed):
    x, weight, bias = case_of().inputs_for(torch.float64, seed=seed)
    (x,) = mapped((x_dim,), (x,))
    offsets = torch.stack([ends_of(*rows) for rows in ((3, 0, 1, 3), (0, 0, 7, 0), (2, 2, 2, 1))]).movedim(0, dim)

    def call(function):
        return lambda x, offsets: function(x, weight, bias, offsets=offsets, activation="tanh")

    expected = loop(call(reference.ragged_linear), (x_dim, dim), (x, offsets))
    close(vmap(call(ragged_linear), (x_dim, dim))(x, offsets), expected)


@some_activations
def test_jacobians(activation, seed):
    inputs = [t.detach() for t in double_inputs(case_of(), seed)]
    every = tuple(range(3))
    close(jacrev(ours(activation), every)(*inputs), jacrev(oracle(activation), every)(*inputs))


def test_autocast(seed):
    """As torch.nn.functional.linear: the dtype of autocast, from float32 parameters."""
    inputs = leaves(case_of("one").inputs_for(torch.float32, seed=seed))
    with torch.autocast("cpu", torch.bfloat16):
        y = ours("relu")(*inputs)
    assert y.dtype == torch.bfloat16
    cast = leaves([t.bfloat16() for t in inputs])
    expected = ours("relu")(*cast)
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), cast)
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(*grads))
