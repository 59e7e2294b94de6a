"""indexed_linear beyond the values that test_ops checks: indices of any kind, derivatives, memory, modes of PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import RUNNERS, derivatives, leaves, runs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from effens_kernels import indexed_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.indexed_linear import reference
from effens_kernels.ops.indexed_linear.autograd import FORM
from effens_kernels.testing import IndexedCase, assert_accurate

NAMES = ("x", "weight", "bias")
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
some_activations = pytest.mark.parametrize("activation", [None, "relu", "gelu"])  # saves nothing, y, z
biases = pytest.mark.parametrize("bias", ["each", "one", "none"])
HERE = [r for r in RUNNERS if r.dtypes("indexed_linear")]
on_runners = pytest.mark.parametrize("runner", HERE, indirect=True, ids=str)


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# 3 inputs, 4 weights: repeated, out of order, one pair twice; input 1 and weight 2 are used by no group.
X_INDEX, WEIGHT_INDEX = index(2, 0, 2, 2, 0), index(3, 3, 0, 1, 3)
OPTIONS = {"x_index": X_INDEX, "weight_index": WEIGHT_INDEX}


def case_of(bias: str = "each", activation: str | None = None) -> IndexedCase:
    one = bias == "one"
    return IndexedCase(4, 3, 4, 3, bias=bias != "none", shared_bias=one, activation=activation, sources=3, groups=5)


def double_inputs(case: IndexedCase, seed: int) -> list[Tensor | None]:
    """float64 leaves whose pre-activations keep clear of relu's kink."""
    for attempt in itertools.count(seed):
        inputs = case.inputs_for(torch.float64, seed=attempt)
        if reference.indexed_linear(*inputs, **OPTIONS).abs().min() > 1e-3:
            return leaves(inputs)


def ours(activation=None, backend="cpu", **options):
    options = {**OPTIONS, "activation": activation, "backend": backend, **options}
    return lambda *inputs: indexed_linear(*inputs, **options)


def oracle(activation=None, **options):
    options = {**OPTIONS, "activation": activation, **options}
    return lambda *inputs: reference.indexed_linear(*inputs, **options)


def loss(call):
    """A scalar in which each output has a weight of its own."""

    def value(*inputs):
        y = call(*inputs)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return value


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def check(inputs, gradient, runner, activation=None, terms=(1, 1, 1, 1), **options) -> dict[str, Tensor]:
    """Values and gradients against float64, by the rule of the tests; and the values."""
    exact = derivatives(
        oracle(activation, **options), [None if t is None else t.double() for t in inputs], gradient.double()
    )
    plain = derivatives(oracle(activation, **options), inputs, gradient)
    found = derivatives(ours(activation, runner.backend, **options), inputs, gradient)
    for (name, value), count in zip(found.items(), terms):
        assert_accurate(value, exact[name], plain[name], name, count)
    return found


# ---------------------------------------------------------------------------------------------------------- indices


@pytest.mark.parametrize(
    ("dtype", "runner"), runs(torch.float32, torch.bfloat16, op="indexed_linear"), indirect=["runner"]
)
@activations
def test_what_no_group_uses_has_gradients_of_zero(activation, dtype, runner, seed):
    inputs = IndexedCase(4, 9, 33, 21, sources=3).inputs_for(dtype, runner.device, seed)
    options = {name: t.to(runner.device) for name, t in OPTIONS.items()}
    gradient = torch.randn(5, 9, 21, device=runner.device).to(dtype)
    found = check(inputs, gradient, runner, activation, (33, 63, 27, 27), **options)
    assert not found["x"][1].any()
    assert not found["weight"][2].any()
    assert not found["bias"][2].any()
    assert found["x"][0].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("layout", ["contiguous", "stepped", "expanded", "offset"])
@on_runners
def test_indices_of_any_layout(layout, dtype, runner, seed):
    """Equal to those of contiguous indices, to the last bit."""
    case = IndexedCase(4, 5, 17, 9, sources=3, activation="relu")
    inputs = case.inputs_for(torch.float32, runner.device, seed)
    values = [2, 2, 2, 2] if layout == "expanded" else [2, 0, 1, 2]
    plain = torch.tensor(values, dtype=dtype, device=runner.device)
    laid_out = {
        "contiguous": plain,
        "stepped": torch.stack([plain, torch.full_like(plain, 99)], 1).flatten()[::2],
        "expanded": plain[:1].expand(4),
        "offset": torch.cat([torch.full_like(plain, -7), plain, plain])[4:8],
    }[layout]
    gradient = torch.randn(4, 5, 9, device=runner.device)
    others = index(3, 0, 0, 1).to(runner.device)
    expected, actual = (
        derivatives(ours("relu", runner.backend, x_index=x_index, weight_index=others), inputs, gradient)
        for x_index in (plain.long(), laid_out)
    )
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("groups", [1, 2, 300])
@pytest.mark.parametrize(
    ("dtype", "runner"), runs(torch.float32, torch.bfloat16, op="indexed_linear"), indirect=["runner"]
)
def test_random_indices(groups, dtype, runner, seed):
    """More groups than weights, and fewer."""
    groups = min(groups, 50) if runner.slow else groups
    inputs = IndexedCase(11, 3, 17, 9, sources=7).inputs_for(dtype, runner.device, seed)
    options = {
        "x_index": torch.randint(7, (groups,), device=runner.device),
        "weight_index": torch.randint(11, (groups,), dtype=torch.int32, device=runner.device),
    }
    gradient = torch.randn(groups, 3, 9, device=runner.device).to(dtype)
    of_input, of_weight = (int(i.bincount().max()) for i in options.values())
    check(inputs, gradient, runner, "tanh", (17, 9 * of_input, 3 * of_weight, 3 * of_weight), **options)


@on_runners
def test_pairs_in_order_are_grouped_linear(runner, seed):
    from effens_kernels import grouped_linear

    inputs = IndexedCase(4, 5, 17, 9, sources=4).inputs_for(torch.float32, runner.device, seed)
    gradient = torch.randn(4, 5, 9, device=runner.device)
    each = torch.arange(4, device=runner.device)
    actual = derivatives(ours("gelu", runner.backend, x_index=each, weight_index=each), inputs, gradient)
    expected = derivatives(grouped_linear, inputs, gradient, activation="gelu", backend=runner.backend)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("sources", "members", "groups"), [(3, 4, 0), (0, 4, 0), (3, 0, 0), (0, 0, 0), (3, 4, 5)], ids=str
)
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(2, 3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@on_runners
def test_empty(batch, inputs, outputs, sources, members, groups, activation, runner, seed):
    """Nothing is left unwritten, however little there is to write."""
    case = IndexedCase(members, batch, inputs, outputs, sources=sources, groups=groups, activation=activation)
    tensors = case.inputs_for(torch.float64 if runner.backend == "cpu" else torch.float32, runner.device, seed)
    options = {n: t.to(runner.device) for n, t in case.options().items() if n != "activation"}
    gradient = torch.randn(groups, batch, outputs, device=runner.device).to(tensors[0].dtype)
    expected = derivatives(oracle(activation, **options), tensors, gradient)
    for _ in range(2):  # memory that was used before
        [torch.full_like(t, float("nan")) for t in (*tensors, gradient)]
        actual = derivatives(ours(activation, runner.backend, **options), tensors, gradient)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["spread", "one_weight", "one_input"])
def test_the_same_bits_for_any_number_of_threads(where, dtype, isa, threads, seed):
    """However groups are shared out: evenly, or with nearly all of one weight or input."""
    groups, sources, members = 23, 5, 6
    inputs = IndexedCase(members, 40, 130, 70, sources=sources).inputs_for(dtype, seed=seed)
    options = {"x_index": torch.randint(sources, (groups,)), "weight_index": torch.randint(members, (groups,))}
    if where == "one_weight":
        options["weight_index"][1:] = 4
    if where == "one_input":
        options["x_index"][1:] = 2
    gradient = torch.randn(groups, 40, 70).to(dtype)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(derivatives(ours("tanh", **options), inputs, gradient))
    for other, name in itertools.product(results[1:], results[0]):
        assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize(
    ("dtype", "runner"), runs(torch.bfloat16, torch.float16, op="indexed_linear"), indirect=["runner"]
)
def test_sums_over_groups_are_not_rounded_each_time(dtype, runner, seed):
    """Many groups of one input and one weight: rounded to 16 bits after each, the errors would add up.

    What they may be at most is one rounding of the sum in float64, and the accumulation's.
    """
    inputs = IndexedCase(2, 3, 16, 16, sources=2).inputs_for(dtype, runner.device, seed)
    groups = 40 if runner.slow else 200
    numbers = torch.zeros(groups, dtype=torch.int64, device=runner.device)
    gradient = torch.rand(groups, 3, 16, device=runner.device).to(dtype)
    options = {"x_index": numbers, "weight_index": numbers}
    found = derivatives(ours(None, runner.backend, **options), inputs, gradient)
    exact = derivatives(oracle(**options), [t.double() for t in inputs], gradient.double())
    for name in NAMES:
        rounded = exact[name].to(dtype)
        assert_accurate(found[name], exact[name], rounded, name, 16 * groups)
    check(inputs, gradient, runner, None, (16, 16 * groups, 3 * groups, 3 * groups), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_run_over_groups_in_their_order(dtype, isa):
    """In float32 the one is lost in any other order; groups of another weight and input lie between."""
    inputs = [torch.ones(shape, dtype=dtype) for shape in ((2, 1, 1), (2, 1, 1), (2, 1))]
    numbers = index(1, 0, 1, 0, 1)
    gradient = torch.tensor([32768.0, 5, -32768, 7, 2**-11], dtype=dtype).view(5, 1, 1)
    found = derivatives(ours(x_index=numbers, weight_index=numbers), inputs, gradient)
    assert all(found[name].flatten().tolist() == [12, 2**-11] for name in NAMES)


@pytest.mark.parametrize("needed", [n for k in (1, 2) for n in itertools.combinations(NAMES, k)], ids="+".join)
@on_runners
def test_only_the_gradients_asked_for(needed, runner, seed):
    """The same values, whatever else is computed beside them."""
    inputs = dict(zip(NAMES, case_of().inputs_for(torch.float32, runner.device, seed)))
    options = {name: t.to(runner.device) for name, t in OPTIONS.items()}
    gradient = torch.randn(5, 3, 3, device=runner.device)
    every = derivatives(ours("gelu", runner.backend, **options), list(inputs.values()), gradient)
    some = {name: t.detach().requires_grad_(name in needed) for name, t in inputs.items()}
    y = ours("gelu", runner.backend, **options)(*some.values())
    for name, value in zip(needed, torch.autograd.grad(y, [some[name] for name in needed], gradient)):
        torch.testing.assert_close(value, every[name], rtol=1e-5, atol=1e-5)


@activations
@pytest.mark.parametrize("runner", [r for r in HERE if r.isa in (None, "baseline")], indirect=True, ids=str)
def test_saved_bytes(activation, runner, seed):
    """The inputs themselves and the indices; besides, y for relu and tanh, one new tensor for gelu and silu."""
    inputs = leaves(IndexedCase(4, 5, 7, 4, sources=3).inputs_for(torch.float32, runner.device, seed))
    options = {name: t.to(runner.device) for name, t in OPTIONS.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = ours(activation, runner.backend, **options)(*inputs)
    given = [*inputs[:2], *options.values()]
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in given) + (y.nbytes if activation else 0)
    known = {t.untyped_storage().data_ptr() for t in (*given, y)}
    assert len({t.untyped_storage().data_ptr() for t in kept} - known) == (activation in ("gelu", "silu"))


def test_an_index_that_changed_before_backward_is_an_error(seed):
    x, weight, bias = leaves(case_of().inputs_for(seed=seed))
    numbers = X_INDEX.clone()
    y = indexed_linear(x, weight, bias, x_index=numbers, weight_index=WEIGHT_INDEX)
    numbers[0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


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
        return FORM.fwd_op(x, weight, X_INDEX, WEIGHT_INDEX, bias, activation, activation == "gelu", "cpu")[0]

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
    """Where no other factor has a gradient, the bias alone has to find its groups."""
    x, weight, bias = double_inputs(case_of(), seed)

    def second(call):
        (first,) = torch.autograd.grad(call(x.detach(), weight.detach(), bias).square().sum(), bias, create_graph=True)
        return torch.autograd.grad((first**3).sum(), bias)

    close(second(ours("tanh")), second(oracle("tanh")))


# --------------------------------------------------------------------------------------------- PyTorch's other modes


@pytest.mark.parametrize(
    ("activation", "bias", "need"),
    [(None, "none", (True, True, True)), ("relu", "each", (True, False, False)), ("gelu", "each", (False, True, True))],
)
def test_opcheck(activation, bias, need, seed):
    x, weight, bias = leaves(case_of(bias).inputs_for(seed=seed))
    operands = x, weight, X_INDEX, WEIGHT_INDEX.int()
    torch.library.opcheck(FORM.fwd_op, (*operands, bias, activation, activation == "gelu", "cpu"))
    gradient = torch.randn(5, 3, 3, requires_grad=True)
    saved = torch.randn_like(gradient).requires_grad_() if activation else torch.empty(0)
    torch.library.opcheck(FORM.bwd_op, (gradient, *operands, saved, activation, *need, "cpu"))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@some_activations
def test_compile_with_any_number_of_rows_and_groups(backend, activation, seed):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(indexed_linear, fullgraph=True, dynamic=True, backend=counter)
    for batch, groups in ((5, 6), (11, 9), (9, 2)):  # sizes that are equal at first are taken to be equal
        case = IndexedCase(4, batch, 7, 4, sources=3, groups=groups, shared_bias=True, activation=activation)
        inputs, gradient = case.inputs_for(torch.float32, seed=seed), torch.randn(groups, batch, 4)
        actual = derivatives(call, inputs, gradient, **case.options(), backend=backend)
        expected = derivatives(reference.indexed_linear, inputs, gradient, **case.options())
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_export_with_any_number_of_groups(seed):
    class Model(torch.nn.Module):
        def forward(self, x, weight, bias, x_index, weight_index):
            return indexed_linear(x, weight, bias, x_index=x_index, weight_index=weight_index, activation="relu")

    inputs = case_of().inputs_for(torch.float32, seed=seed)
    groups = torch.export.Dim("G", min=2, max=64)
    shapes = dict.fromkeys(NAMES) | {"x_index": {0: groups}, "weight_index": {0: groups}}
    program = torch.export.export(Model(), (*inputs, X_INDEX, WEIGHT_INDEX), dynamic_shapes=shapes)
    assert any("indexed_linear_fwd" in str(node.target) for node in program.graph.nodes)
    for numbers in ((X_INDEX, WEIGHT_INDEX), (X_INDEX[:3], WEIGHT_INDEX[:3])):
        expected = reference.indexed_linear(*inputs, "relu", x_index=numbers[0], weight_index=numbers[1])
        torch.testing.assert_close(program.module()(*inputs, *numbers), expected)


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


@pytest.mark.parametrize("x_dim", [None, 0], ids=["x:None", "x:0"])
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (-1, 0)], ids=str)
def test_vmap_over_indices(dims, x_dim, seed):
    (x, weight, bias), numbers = case_of().inputs_for(torch.float64, seed=seed), [X_INDEX, WEIGHT_INDEX]
    inputs = mapped((x_dim,), (x,))
    for i, (dim, most) in enumerate(zip(dims, (3, 4))):
        if dim is not None:
            numbers[i] = torch.randint(most, (SIZE, 5)).movedim(0, dim)

    def call(function):
        return lambda x, x_index, weight_index: function(
            x, weight, bias, x_index=x_index, weight_index=weight_index, activation="tanh"
        )

    everything = (*inputs, *numbers)
    expected = loop(call(reference.indexed_linear), (x_dim, *dims), everything)
    close(vmap(call(indexed_linear), (x_dim, *dims))(*everything), expected)


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
