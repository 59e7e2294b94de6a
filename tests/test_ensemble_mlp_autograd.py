"""ensemble_mlp in PyTorch's machinery: derivatives of any order, what is kept for them, transforms and compilers."""

from __future__ import annotations

import itertools

import pytest
import torch
from mlp_cases import Inputs, MLPCase, chain, gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from effens_kernels import ensemble_mlp, nn
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.ensemble_mlp import reference

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
rows = pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
layers = pytest.mark.parametrize("shared_layers", [(), (0,), (1,), (0, 1)], ids=["own", "trunk", "head", "all"])
SMOOTH = MLPCase(2, 3, (4, 3, 2), "tanh", "silu")
AOT = "aot_eager"  # what the other compilers build on, without their minutes of C++ compilation


def clear_of_kinks(case: MLPCase, seed: int) -> Inputs:
    """float64 inputs whose pre-activations keep clear of relu's kink, where differences would not be derivatives."""
    for attempt in itertools.count(seed):
        inputs = case.inputs_for(torch.float64, seed=attempt)
        z = [
            reference.ensemble_mlp(inputs.x, inputs.weights[:n], inputs.biases[:n], case.activation)
            for n in range(1, case.depth + 1)
        ]
        if min(t.abs().min().item() for t in z) > 1e-3:
            return inputs.leaves()


def flat(case: MLPCase, inputs: Inputs, backend: str = "cpu", op=ensemble_mlp):
    """The op as a function of its tensors in a row, and these."""
    named = inputs.tensors()

    def call(*tensors):
        given = dict(zip(named, tensors))
        weights = [given[f"weights[{n}]"] for n in range(case.depth)]
        biases = [given.get(f"biases[{n}]") for n in range(case.depth)]
        return op(given["x"], weights, biases, **case.options, backend=backend)

    return call, tuple(named.values())


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------------------------------------- derivatives


@activations
@rows
@layers
def test_gradcheck(activation, shared, shared_layers, seed):
    out_activation = None if activation == "relu" else activation
    case = MLPCase(2, 3, (3, 4, 2), activation, out_activation, shared, shared_layers, bias="some")
    assert gradcheck(*flat(case, clear_of_kinks(case, seed)), check_batched_grad=True)


@activations
@rows
@layers
def test_gradgradcheck(activation, shared, shared_layers, seed):
    out_activation = None if activation == "relu" else activation
    case = MLPCase(2, 2, (2, 2, 2), activation, out_activation, shared, shared_layers)
    assert gradgradcheck(*flat(case, clear_of_kinks(case, seed)), check_batched_grad=True)


@activations
@layers
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives(activation, shared_layers, order, seed):
    """create_graph through every argument, as PyTorch's own."""
    case = MLPCase(3, 5, (4, 6, 3), activation, "tanh", shared_layers=shared_layers)
    inputs = case.inputs_for(torch.float64, seed=seed).leaves()

    def derivatives(backend):
        call, tensors = flat(case, inputs, backend)
        found, value = [], call(*tensors).pow(2).sum()
        for _ in range(order):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            found += grads
            value = sum(g.pow(2).mean() for g in grads)
        return found

    for actual, expected in zip(derivatives("cpu"), derivatives("reference")):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
def test_an_argument_given_twice(order, seed):
    """Its gradient is the sum over where it is used, once; also where one argument is a function of another."""
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (2, 4, 4), (2, 4)))

    def derivatives(backend):
        h = x * weight.sum()
        y = ensemble_mlp(h, [weight, weight, weight.mT], [bias, None, bias], activation="tanh", backend=backend)
        first = torch.autograd.grad(y.pow(2).sum(), (x, weight, bias), create_graph=order > 1)
        if order == 1:
            return first
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, weight, bias))

    for actual, expected in zip(derivatives("cpu"), derivatives("reference")):
        close(actual, expected)


NAMES = list(SMOOTH.inputs_for().tensors())


@pytest.mark.parametrize(
    "wanted",
    [
        ["x"],
        ["weights[0]"],
        ["biases[1]"],
        ["x", "biases[0]"],
        ["weights[1]", "biases[1]"],
        [n for n in NAMES if n != "x"],
        NAMES,
    ],
    ids="+".join,
)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@layers
def test_frozen_arguments(wanted, activation, shared_layers, seed):
    """Gradients of what asks for them alone, first and second; the rest has none."""
    case = MLPCase(2, 5, (4, 6, 3), activation, "tanh", shared_layers=shared_layers)
    results = []
    for backend in ("cpu", "reference"):
        inputs = case.inputs_for(torch.float64, seed=seed)
        call, tensors = flat(case, inputs, backend)
        named = inputs.tensors()
        for name in wanted:
            named[name].requires_grad_()
        y = call(*tensors)
        first = torch.autograd.grad(y.pow(3).sum(), [named[n] for n in wanted], create_graph=True)
        sum(g.pow(2).sum() for g in first).backward()
        assert [n for n in NAMES if named[n].grad is not None] == [n for n in NAMES if n in wanted]
        results.append([y, *first, *(named[n].grad for n in wanted)])
    for actual, expected in zip(*results):
        close(actual, expected)


def test_frozen_layers_without_rows(seed):
    """Sums over no rows are zeros that are written, whatever the memory held."""
    for trained in (*([name] for name in NAMES), ["x", "biases[0]", "biases[1]"]):
        inputs = MLPCase(2, 0, (4, 3, 2)).inputs_for(torch.float64, seed=seed)
        leaves = [inputs.tensors()[name].requires_grad_() for name in trained]
        y = ensemble_mlp(inputs.x, inputs.weights, inputs.biases, out_activation="tanh", backend="cpu")
        for size in range(1, 30):
            torch.full((size,), float("nan"), dtype=torch.float64)
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves)), trained


@activations
def test_part_of_the_result_and_no_part(activation, seed):
    case = MLPCase(3, 5, (4, 6, 3), activation)
    call, tensors = flat(case, case.inputs_for(torch.float64, seed=seed).leaves())
    expected, _ = flat(case, case.inputs_for(torch.float64, seed=seed), "reference")
    for part in (lambda y: y[1], lambda y: y[..., :1], lambda y: y[:0]):
        for a, b in zip(*(torch.autograd.grad(part(f(*tensors)).sum(), tensors) for f in (call, expected))):
            close(a, b)


# ------------------------------------------------------------------------------------------------- what is kept


def kept_by(call) -> tuple[dict[int, int], Tensor]:
    """{address: bytes} of the memory that autograd keeps of `call`, and its result."""
    kept = {}

    def pack(t):
        if t.numel():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return kept, y


@activations
@pytest.mark.parametrize("out_activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(7, 4), (7, 6, 4), (7, 6, 5, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@rows
def test_saved_bytes(activation, out_activation, widths, dtype, shared, seed):
    """The arguments and at most y themselves; besides, one tensor of hidden outputs and pre-activations."""
    case = MLPCase(3, 5, widths, activation, out_activation, shared)
    inputs = case.inputs_for(dtype, seed=seed).leaves()
    call, tensors = flat(case, inputs)
    kept, y = kept_by(lambda: call(*tensors))
    saves_z = ("gelu", "silu")
    columns = sum(widths[1:-1]) * (2 if activation in saves_z else 1) + widths[-1] * (out_activation in saves_z)
    hidden = case.members * case.batch * columns * dtype.itemsize
    own = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}
    if out_activation in ("relu", "tanh"):
        own[y.untyped_storage().data_ptr()] = y.nbytes
    assert {address: size for address, size in kept.items() if address in own} == own
    assert [size for address, size in kept.items() if address not in own] == [hidden] * (hidden > 0)


def test_saved_bytes_of_a_trunk(seed):
    """A trunk that all members share keeps its hidden values once, not per member."""
    case = MLPCase(10, 5, (7, 6, 8, 4), "relu", shared=True, shared_layers=(0, 1))
    call, tensors = flat(case, case.inputs_for(seed=seed).leaves())
    kept, _ = kept_by(lambda: call(*tensors))
    assert sum(kept.values()) == sum(t.nbytes for t in tensors) + 5 * (6 + 8) * 4


@activations
@layers
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_nothing_is_kept_without_gradients(activation, shared_layers, mode, seed):
    case = MLPCase(3, 5, (7, 6, 4), activation, shared=True, shared_layers=shared_layers)
    inputs = case.inputs_for(seed=seed)
    call, tensors = flat(case, inputs)
    kept, y = kept_by(lambda: call(*tensors))
    assert not kept
    assert y.grad_fn is None
    with mode():
        kept, y = kept_by(lambda: call(*inputs.leaves().tensors().values()))
        made_there = call(*(t.clone() for t in tensors))
    assert not kept
    assert not y.requires_grad
    assert torch.equal(made_there, y)


@activations
def test_second_backward_needs_retain_graph(activation, seed):
    case = MLPCase(3, 5, (7, 6, 4), activation, activation)
    call, tensors = flat(case, case.inputs_for(seed=seed).leaves())
    y = call(*tensors).square().sum()
    first = torch.autograd.grad(y, tensors, retain_graph=True)
    second = torch.autograd.grad(y, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, tensors)


@pytest.mark.parametrize("position", range(3), ids=["x", "weight", "hidden_weight"])
def test_changing_a_saved_input_is_an_error(position, seed):
    case = MLPCase(3, 5, (7, 6, 4), bias="none")
    call, tensors = flat(case, case.inputs_for(seed=seed).leaves())
    y = call(*tensors)
    with torch.no_grad():
        tensors[position].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@activations
def test_changing_the_result(activation, seed):
    """An error where it is saved (relu, tanh), as in torch; else harmless."""
    case = MLPCase(3, 5, (7, 6, 4), "relu", activation)
    call, tensors = flat(case, case.inputs_for(seed=seed).leaves())
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    y = call(*tensors)
    y.add_(1)
    if activation in ("relu", "tanh"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), tensors), expected))


def test_gradients_accumulate_over_calls(seed):
    case = MLPCase(3, 5, (7, 6, 4), "tanh")
    inputs = case.inputs_for(torch.float64, seed=seed).leaves()
    call, tensors = flat(case, inputs)
    for _ in range(2):
        (call(*tensors) + call(*tensors)).sum().backward()
    expected = gradients(reference.ensemble_mlp, inputs, torch.ones(3, 5, 4, dtype=torch.float64), **case.options)
    for name, t in inputs.tensors().items():
        close(t.grad, 4 * expected[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, seed):
    case = MLPCase(3, 17, (30, 20, 10), "gelu")
    inputs = case.inputs_for(seed=seed)
    grad = case.grad_for(inputs.x, seed + 1)
    expected = gradients(ensemble_mlp, inputs, grad, **case.options)
    inputs = inputs.leaves()
    call, tensors = flat(case, inputs)
    checkpoint(call, *tensors, use_reentrant=use_reentrant).backward(grad)
    assert all(torch.equal(t.grad, expected[name]) for name, t in inputs.tensors().items())


# ----------------------------------------------------------------------------------------------------- torch.func


@rows
@layers
def test_transforms(shared, shared_layers, seed):
    """grad, jacrev, vmap over each argument, and vmap of grad, as over the reference."""
    case = MLPCase(2, 3, (4, 5, 2), "gelu", "tanh", shared, shared_layers)
    inputs = case.inputs_for(torch.float64, seed=seed)
    (ours, tensors), (oracle, _) = flat(case, inputs), flat(case, inputs, "reference")

    def loss(call):
        return lambda *tensors: call(*tensors).pow(2).sum()

    every = tuple(range(len(tensors)))
    for actual, expected in zip(*(grad(loss(f), every)(*tensors) for f in (ours, oracle))):
        close(actual, expected)
    for actual, expected in zip(*(jacrev(f, every)(*tensors) for f in (ours, oracle))):
        close(actual, expected)
    for mapped in (*((n,) for n in every), every):
        dims = tuple(0 if n in mapped else None for n in every)
        given = [torch.randn(3, *t.shape, dtype=t.dtype) if n in mapped else t for n, t in enumerate(tensors)]
        close(vmap(ours, dims)(*given), vmap(oracle, dims)(*given))
        for actual, expected in zip(*(vmap(grad(loss(f), every), dims)(*given) for f in (ours, oracle))):
            close(actual, expected)


def test_ordinary_gradients_flow_through_a_transform(seed):
    """A loss made of torch.func gradients trains the weights by ordinary backward."""
    inputs = SMOOTH.inputs_for(torch.float64, seed=seed).leaves()
    results = []
    for backend in ("cpu", "reference"):
        call, (x, *parameters) = flat(SMOOTH, inputs, backend)
        slope = grad(lambda x, call=call, p=parameters: call(x, *p).sum())(x)
        results.append(torch.autograd.grad(slope.square().sum(), parameters))
    for actual, expected in zip(*results):
        close(actual, expected)


@pytest.mark.parametrize("route", ["dual_numbers", "func.jvp"])
def test_forward_mode_is_right_or_refused(route, seed):
    """A tangent that is silently dropped would be a derivative of zero."""
    inputs = SMOOTH.inputs_for(torch.float64, seed=seed)
    direction = torch.randn_like(inputs.x)

    def tangent(backend):
        call, (x, *parameters) = flat(SMOOTH, inputs, backend)
        if route == "func.jvp":
            return torch.func.jvp(lambda x: call(x, *parameters), (x,), (direction,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction), *parameters)).tangent

    expected = tangent("reference")
    try:
        actual = tangent("cpu")
    except NotImplementedError:
        return
    close(actual, expected)


# ------------------------------------------------------------------------------------------- compilers and modes


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "case",
    [
        MLPCase(3, 20, (30, 16, 10), "relu"),
        MLPCase(3, 20, (30, 16, 10), "gelu", "tanh", shared=True, bias="some"),
        MLPCase(3, 20, (30, 16, 16, 10), "silu", shared=True, shared_layers=(0, 1)),
        MLPCase(3, 20, (30, 16, 10), "tanh", shared_layers=(0,)),
    ],
    ids=str,
)
def test_compiled_equals_eager(case, seed):
    """One graph whatever the batch, forward and backward: the bits of the chain."""
    counter = CompileCounterWithBackend(AOT)
    compiled = torch.compile(ensemble_mlp, fullgraph=True, dynamic=True, backend=counter)
    for batch in (20, 7, 33):
        case = MLPCase(case.members, batch, *list(vars(case).values())[2:])
        inputs = case.inputs_for(seed=seed)
        grad = case.grad_for(inputs.x, seed + 1)
        expected = gradients(chain, inputs, grad, **case.options)
        for name, value in gradients(compiled, inputs, grad, **case.options).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("shared_layers", [0, 1, 3])
def test_export_with_any_batch(shared_layers):
    model = nn.EnsembleMLP(6, [8, 8], 4, num_members=3, activation="gelu", shared_layers=shared_layers)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(9, 6),), dynamic_shapes=({0: batch},))
    for size in (9, 4, 31):
        x = torch.randn(size, 6)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)


def test_meta_tensors(seed):
    inputs = MLPCase(3, 5, (7, 6, 4), "gelu", shared_layers=(0,)).inputs_for(seed=seed).map(lambda t: t.to("meta"))
    inputs = inputs.leaves()
    y = ensemble_mlp(inputs.x, inputs.weights, inputs.biases)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 5, 4), torch.float32)
    y.sum().backward()
    assert all(t.grad.device.type == "meta" and t.grad.shape == t.shape for t in inputs.tensors().values())


@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_autocast_equals_explicit_casts(activation, dtype, backend, seed):
    """Output in autocast's dtype; gradients in the dtype of the parameters."""
    case = MLPCase(3, 17, (30, 20, 10), activation, bias="some")
    inputs = case.inputs_for(seed=seed)

    def under_autocast(*arguments, **options):
        with torch.autocast("cpu", dtype):
            return ensemble_mlp(*arguments, **options, backend=backend)

    def cast(x, weights, biases, **options):
        given = Inputs(x, weights, biases).map(lambda t: t.to(dtype))
        return ensemble_mlp(given.x, given.weights, given.biases, **options, backend=backend)

    grad = case.grad_for(inputs.x, seed).to(dtype)
    actual, expected = (gradients(f, inputs, grad, **case.options) for f in (under_autocast, cast))
    for name, value in expected.items():
        assert actual[name].dtype == (dtype if name == "y" else torch.float32)
        assert torch.equal(actual[name], value), name


def test_tensor_subclasses_keep_their_type(seed):
    class Named(torch.Tensor):
        pass

    inputs = SMOOTH.inputs_for(seed=seed)
    y = ensemble_mlp(inputs.x.as_subclass(Named), inputs.weights, inputs.biases)
    assert type(y) is Named
    torch.testing.assert_close(y.as_subclass(torch.Tensor), ensemble_mlp(inputs.x, inputs.weights, inputs.biases))


def test_dispatch_modes_see_an_op_per_layer_and_direction(seed):
    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    call, tensors = flat(SMOOTH, SMOOTH.inputs_for(seed=seed).leaves())
    with Log() as log:
        torch.autograd.grad(call(*tensors).sum(), tensors)
    ours = [name.removeprefix("effens_kernels.grouped_linear_") for name in log.names if "effens" in name]
    assert ours == ["fwd.default"] * 2 + ["bwd.default"] * 2
