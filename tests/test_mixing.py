"""mix_templates and mixture_linear beyond the values that test_ops checks: derivatives, memory, modes of PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import OPS, RUNNERS, derivatives, leaves, runs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from effens_kernels import _dispatch, mix_templates, mixture_linear
from effens_kernels.ops.mix_templates import autograd as mixing
from effens_kernels.ops.mixture_linear.autograd import FORM
from effens_kernels.testing import MixCase, MixtureCase, assert_accurate

# One case for each way to compute: by weights of members, by outputs of templates; rows shared or not.
CASES = {
    "mix_templates": ("mix_templates", MixCase((2, 3), 4, (3, 5))),
    "weights": ("mixture_linear", MixtureCase(2, 3, 4, 3, templates=2)),
    "weights-gelu": ("mixture_linear", MixtureCase(2, 3, 4, 3, templates=2, activation="gelu")),
    "weights-shared-relu": ("mixture_linear", MixtureCase(2, 3, 4, 3, shared=True, templates=2, activation="relu")),
    "blocks": ("mixture_linear", MixtureCase(2, 3, 4, 3, templates=2)),
    "blocks-gelu": ("mixture_linear", MixtureCase(2, 3, 4, 3, templates=2, activation="gelu")),
    "blocks-shared-relu": ("mixture_linear", MixtureCase(2, 3, 4, 3, shared=True, templates=2, activation="relu")),
    "outputs-gelu": ("mixture_linear", MixtureCase(3, 2, 4, 3, templates=2, activation="gelu")),
    "outputs-shared": ("mixture_linear", MixtureCase(3, 3, 4, 3, shared=True, templates=2)),
    "outputs-shared-tanh": ("mixture_linear", MixtureCase(3, 3, 4, 3, shared=True, templates=2, activation="tanh")),
}
every_case = pytest.mark.parametrize("name", CASES)


def on_runners(isa: str | None = None):
    """Every case on every backend; on the CPU on every instruction set, or one.  Blocks are the CPU's own."""
    return pytest.mark.parametrize(
        ("name", "runner"),
        [
            pytest.param(name, runner, id=f"{name}-{runner}")
            for name in CASES
            for runner in RUNNERS
            if (runner.isa in (None, isa) or isa is None) and (runner.backend == "cpu" or not name.startswith("blocks"))
        ],
        indirect=["runner"],
    )


@pytest.fixture
def route(request, monkeypatch):
    """mixture_linear by the route that a case's name begins with, at any size."""
    name = request.node.callspec.params["name"]
    if CASES.get(name, LARGE.get(name))[0] == "mixture_linear":
        monkeypatch.setattr(_dispatch, "mixture_route", lambda *_: name.split("-")[0])


pytestmark = pytest.mark.usefixtures("route")


def double_inputs(name: str, seed: int) -> list[Tensor]:
    """float64 leaves whose pre-activations keep clear of relu's kink."""
    op, case = CASES[name]
    for attempt in itertools.count(seed):
        inputs = case.inputs_for(torch.float64, seed=attempt)
        if OPS[op].reference(*inputs).abs().min() > 1e-3:
            return leaves(inputs)


def ours(name: str, backend: str | None = "cpu"):
    op, case = CASES[name]
    return lambda *inputs: OPS[op].call(*inputs, **case.options(), backend=backend)


def oracle(name: str):
    op, case = CASES[name]
    return lambda *inputs: OPS[op].reference(*inputs, **case.options())


def loss(call):
    """A scalar in which each output has a weight of its own."""

    def value(*inputs):
        y = call(*inputs)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return value


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ derivatives


@every_case
def test_gradcheck_of_both_orders(name, seed):
    inputs = double_inputs(name, seed)
    assert gradcheck(ours(name), inputs)
    assert gradgradcheck(ours(name), inputs)


@every_case
def test_gradcheck_of_the_registered_op(name, seed):
    """The route of everything but plain eager calls."""
    op, case = CASES[name]
    inputs = double_inputs(name, seed)
    if op == "mix_templates":
        inputs = [inputs[0].detach().flatten(0, 1).requires_grad_(), inputs[1].detach().flatten(1).requires_grad_()]

    def call(*tensors):
        if op == "mix_templates":
            return mixing.fwd_op(*tensors, "cpu")
        return FORM.fwd_op(*tensors, case.activation, case.activation == "gelu", "cpu")[0]

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@every_case
def test_third_derivatives(name, seed):
    inputs = double_inputs(name, seed)

    def third(call):
        first = torch.autograd.grad(loss(call)(*inputs), inputs, create_graph=True)
        second = torch.autograd.grad(
            sum((g * g).sum() for g in first), inputs, create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(sum((g * g).sum() for g in second), inputs, materialize_grads=True)

    close(third(ours(name)), third(oracle(name)))


@on_runners()
def test_only_the_gradients_asked_for(name, runner, seed):
    """The same values, whatever else is computed beside them."""
    op, case = CASES[name]
    names = OPS[op].arguments
    inputs = dict(zip(names, case.inputs_for(torch.float32, runner.device, seed)))
    shape = OPS[op].reference(*inputs.values()).shape
    gradient = torch.randn(shape, device=runner.device)
    every = derivatives(ours(name, runner.backend), list(inputs.values()), gradient)
    for count in range(1, len(names)):
        for wanted in itertools.combinations(names, count):
            some = {key: t.detach().requires_grad_(key in wanted) for key, t in inputs.items()}
            y = ours(name, runner.backend)(*some.values())
            for key, value in zip(wanted, torch.autograd.grad(y, [some[key] for key in wanted], gradient)):
                torch.testing.assert_close(value, every[key], rtol=1e-5, atol=1e-5)


@on_runners("baseline")
def test_saved_bytes(name, runner, seed):
    """The inputs but the bias; besides, y itself for relu and tanh, one new [E, B, O] tensor for gelu."""
    _, case = CASES[name]
    inputs = leaves(case.inputs_for(torch.float32, runner.device, seed))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = ours(name, runner.backend)(*inputs)
    of_templates = name.startswith("outputs-shared")  # kept, for the coefficients' gradient
    extra = 0 if case.activation is None else y.nbytes
    extra += case.templates * case.batch * case.outputs * 4 if of_templates else 0
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inputs[:3]) + extra
    known = {t.untyped_storage().data_ptr() for t in (*inputs, y)}
    assert len({t.untyped_storage().data_ptr() for t in kept} - known) == (case.activation == "gelu") + of_templates


LARGE = {
    "mix_templates": ("mix_templates", MixCase((9,), 7, (50_021,))),
    "mix_templates-few": ("mix_templates", MixCase((3,), 2, (50_000,))),
    "weights": ("mixture_linear", MixtureCase(8, 70, 130, 200, templates=5, activation="tanh")),
    "blocks": ("mixture_linear", MixtureCase(11, 20, 200, 400, templates=4, activation="gelu")),
    "outputs-shared": ("mixture_linear", MixtureCase(8, 70, 130, 200, shared=True, templates=5, activation="gelu")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_right_for_any_number_of_threads_and_the_engines_own_the_same_bits(name, dtype, threads, seed):
    op, case = LARGE[name]
    inputs = case.inputs_for(dtype, seed=seed)
    shape = OPS[op].reference(*inputs).shape
    gradient = torch.randn(shape).to(dtype)
    options = case.options()
    exact = derivatives(OPS[op].reference, [t.double() for t in inputs], gradient.double(), **options)
    plain = derivatives(OPS[op].reference, inputs, gradient, **options)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(derivatives(OPS[op].call, inputs, gradient, **options, backend="cpu"))
        for key, value in found[-1].items():
            assert_accurate(value, exact[key], plain[key], key, case.terms()[key])
            if op == "mix_templates" or name == "blocks":
                assert torch.equal(value, found[0][key]), key


@pytest.mark.parametrize(("dtype", "runner"), runs(torch.float32, torch.bfloat16), indirect=["runner"])
@pytest.mark.parametrize("name", ["mix_templates"])
def test_infinities_and_nans_go_where_they_belong(name, dtype, runner, seed):
    coefficients, templates = MixCase((11,), 5, (300,)).inputs_for(dtype, runner.device, seed)
    templates[1, 7], templates[2, 150], coefficients[4, 3] = float("nan"), float("inf"), float("inf")
    y = mix_templates(coefficients, templates, backend=runner.backend)
    expected = (coefficients.double() @ templates.double()).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


# -------------------------------------------------------------------------------------------------- memory formats


@pytest.mark.parametrize("name", ["mix_templates"])
def test_weights_lie_as_the_templates_do(name, runner, seed):
    case = MixCase((2, 3), 4, (6, 5, 3, 3), layout="channels_last")
    coefficients, templates = leaves(case.inputs_for(torch.float32, runner.device, seed))
    weights = mix_templates(coefficients, templates, backend=runner.backend)
    assert weights[1, 2].is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(weights.sum(), templates)
    assert gradient[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["mix_templates"])
def test_templates_that_are_a_slice_are_not_copied(name, seed, monkeypatch):
    """A view of consecutive templates of a bank, and of consecutive numbers of a blob."""
    bank = torch.randn(9, 4, 3, 3)
    seen = []
    kernel = mixing.kernels("cpu").fwd
    monkeypatch.setattr(mixing.kernels("cpu"), "fwd", lambda c, t: (seen.append(t.data_ptr()), kernel(c, t))[1])
    coefficients = torch.randn(2, 4)
    for view in (bank[3:7], bank.flatten()[5 : 5 + 4 * 30].view(4, 5, 6)):
        torch.testing.assert_close(
            mix_templates(coefficients, view, backend="cpu"), torch.einsum("et,t...->e...", coefficients, view)
        )
        assert seen.pop() == view.data_ptr()


# ----------------------------------------------------------------------------------------------- PyTorch's other modes


@pytest.mark.parametrize("name", ["mix_templates"])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_opcheck_of_mix_templates(name, need):
    coefficients, templates = torch.randn(3, 4, requires_grad=True), torch.randn(4, 10, requires_grad=True)
    torch.library.opcheck(mixing.fwd_op, (coefficients, templates, "cpu"))
    gradient = torch.randn(3, 10, requires_grad=True)
    torch.library.opcheck(mixing.bwd_op, (gradient, coefficients, templates, *need, "cpu"))


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("weights", (True,) * 4),
        ("weights-shared-relu", (True, False, True, False)),
        ("outputs-gelu", (False, True, False, True)),
        ("outputs-shared", (True, False, False, True)),
    ],
)
def test_opcheck_of_mixture_linear(name, need, seed):
    _, case = CASES[name]
    inputs = leaves(case.inputs_for(seed=seed))
    activation = case.activation
    torch.library.opcheck(FORM.fwd_op, (*inputs, activation, activation == "gelu", "cpu"))
    gradient = torch.randn(case.members, case.batch, case.outputs, requires_grad=True)
    saved = torch.randn_like(gradient).requires_grad_() if activation else torch.empty(0)
    torch.library.opcheck(FORM.bwd_op, (gradient, *inputs[:3], saved, activation, *need, "cpu"))


@pytest.mark.parametrize("backend", [None, "cpu"])
@every_case
def test_compile(name, backend, seed):
    torch._dynamo.reset()
    call = torch.compile(ours(name, backend), fullgraph=True, backend="aot_eager")
    inputs = double_inputs(name, seed)
    close(torch.autograd.grad(loss(call)(*inputs), inputs), torch.autograd.grad(loss(oracle(name))(*inputs), inputs))


@pytest.mark.parametrize("name", ["weights"])
def test_compile_with_any_number_of_rows(name, seed):
    torch._dynamo.reset()
    call = torch.compile(
        lambda *t: mixture_linear(*t, activation="relu"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (5, 6, 9):
        inputs = MixtureCase(3, batch, 7, 4, templates=2).inputs_for(torch.float32, seed=seed)
        expected = OPS["mixture_linear"].reference(*inputs, activation="relu")
        torch.testing.assert_close(call(*inputs), expected, rtol=1e-4, atol=1e-5)


@every_case
def test_export(name, seed):
    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return ours(name)(*tensors)

    inputs = tuple(t.detach() for t in double_inputs(name, seed))
    program = torch.export.export(Model(), inputs)
    close(program.module()(*inputs), oracle(name)(*inputs))
    assert any(f"{CASES[name][0]}_fwd" in str(node.target) for node in program.graph.nodes)


SIZE = 3


def mapped(tensors: list[Tensor], dims) -> list[Tensor]:
    drawn = [t if d is None else torch.randn(SIZE, *t.shape, dtype=t.dtype) for t, d in zip(tensors, dims)]
    return [t if d is None else t.movedim(0, d) for t, d in zip(drawn, dims)]


def loop(call, dims, inputs):
    """What vmap means."""
    results = [call(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims))) for i in range(SIZE)]
    return torch.stack(results) if isinstance(results[0], Tensor) else tuple(map(torch.stack, zip(*results)))


@every_case
def test_vmap_and_gradients_inside_it(name, seed):
    """Each argument mapped or not, along its first axis or its last."""
    tensors = [t.detach() for t in double_inputs(name, seed)]
    every = tuple(range(len(tensors)))
    for dims in itertools.product((None, 0), repeat=len(tensors)):
        if all(d is None for d in dims):
            continue
        for axes in (dims, tuple(d and None if d is None else -1 for d in dims)):
            inputs = mapped(tensors, axes)
            close(vmap(ours(name), axes)(*inputs), loop(oracle(name), axes, inputs))
            actual = vmap(grad(loss(ours(name)), argnums=every), axes)(*inputs)
            close(actual, loop(grad(loss(oracle(name)), argnums=every), axes, inputs))


@every_case
def test_batched_gradients(name, seed):
    """What `torch.autograd.functional.jacobian(vectorize=True)` is made of."""
    inputs = double_inputs(name, seed)
    y = ours(name)(*inputs)
    gradients = torch.randn(3, *y.shape, dtype=y.dtype)
    actual = torch.autograd.grad(y, inputs, gradients, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, gradient, retain_graph=True) for gradient in gradients]
    close(actual, tuple(map(torch.stack, zip(*each))))


@every_case
def test_backward_inside_autocast(name, seed):
    """Of what was computed in float32 outside of it: the same gradients."""
    _, case = CASES[name]
    inputs = leaves(case.inputs_for(torch.float32, seed=seed))
    y = ours(name)(*inputs)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, gradient, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(y, inputs, gradient)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@every_case
def test_jacobians(name, seed):
    inputs = [t.detach() for t in double_inputs(name, seed)]
    every = tuple(range(len(inputs)))
    close(jacrev(ours(name), every)(*inputs), jacrev(oracle(name), every)(*inputs))


@every_case
def test_autocast(name, seed):
    """As torch.nn.functional.linear: the dtype of autocast, from float32 parameters."""
    _, case = CASES[name]
    inputs = leaves(case.inputs_for(torch.float32, seed=seed))
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(name)(*inputs)
    assert y.dtype == torch.bfloat16
    cast = leaves([t.bfloat16() for t in inputs])
    expected = ours(name)(*cast)
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), cast)
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["weights", "outputs-shared"])
def test_one_bias_for_all_members(name, runner, seed):
    _, case = CASES[name]
    x, coefficients, templates, bias = case.inputs_for(torch.float32, runner.device, seed)
    one = bias[0].clone().requires_grad_()
    y = mixture_linear(x, coefficients, templates, one, backend=runner.backend)
    expected = OPS["mixture_linear"].reference(x, coefficients, templates, bias[:1].expand_as(bias))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(y)
    (db,) = torch.autograd.grad(y, one, gradient)
    torch.testing.assert_close(db, gradient.sum((0, 1)), rtol=1e-4, atol=1e-4)
