"""Convolutions of members, whatever their weights are made of: values, derivatives, memory, how PyTorch sees them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import leaves, name_of
from conv_cases import FORMS, cases, derivatives, empty_cases, kept_by, small_cases, widened
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from effens_kernels.ops import _member_convolution
from effens_kernels.testing import DTYPES, assert_accurate

CASES = [case for form in FORMS for case in cases(form)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.FORM)
images = pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
small = pytest.mark.parametrize("case", [case for form in FORMS for case in small_cases(form)], ids=str)


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_a_loop_over_members(case):
    inputs = case.inputs_for(torch.float64)
    expected = torch.stack([case.member(inputs, e) for e in range(case.members)])
    bias = inputs[-1]
    if bias is not None:
        expected = expected + bias.unsqueeze(-2)[(..., *(None for _ in case.image))]
    actual = case.run(*inputs, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    inputs = case.inputs_for(dtype)
    with torch.no_grad():
        grad = torch.randn_like(case.run(*inputs, backend="reference"))
    exact = derivatives(case, widened(inputs), grad.double(), backend="reference")
    composition = derivatives(case, inputs, grad, backend="reference")
    actual = derivatives(case, inputs, grad)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_accurate(value, exact[name], composition[name], name, case.terms(name))
    with torch.no_grad():
        assert torch.equal(case.run(*inputs), actual["y"])


@dtypes
@pytest.mark.parametrize("case", [case for form in FORMS for case in empty_cases(form)], ids=str)
def test_empty_sizes(case, dtype):
    inputs = case.inputs_for(dtype)
    actual, expected = derivatives(case, inputs), derivatives(case, inputs, backend="reference")
    sizes = F.conv2d if case.op == "conv2d" else F.conv_transpose2d
    weight = case.weights(torch.float32).to("meta")
    image = sizes(torch.empty(1, case.inputs, *case.image, device="meta"), weight, **case.options).shape[1:]
    assert actual["y"].shape == (case.members, case.batch, *image)
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert actual[name].dtype == dtype
        assert not actual[name].any()


@forms
@images
def test_only_needed_gradients(form, shared, monkeypatch):
    """Each by itself is what it is among all of them, and the convolution's backward is asked for nothing more."""
    case = form(shared=shared, options={"padding": 1})
    values = case.inputs_for(torch.float64)
    all_of_them = derivatives(case, values)
    of_weights = set(case.NAMES[1:-1])
    masks = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.convolution_backward.default:
                masks.append(arguments[-1])
            return function(*arguments, **(options or {}))

    monkeypatch.setattr(_member_convolution, "must_be_seen", lambda _: False)  # the watch itself would be seen
    for needed in [{name} for name in case.NAMES] + [{"x", "bias"}, {case.WEIGHTS, "bias"}, of_weights]:
        inputs = [t.detach().requires_grad_(name in needed) for name, t in zip(case.NAMES, values)]
        y = case.run(*inputs)
        masks.clear()
        with Watch():
            y.backward(torch.ones_like(y))
        kernel = not of_weights.isdisjoint(needed)
        assert masks == [["x" in needed, kernel, kernel and "bias" in needed]] * (0 if needed == {"bias"} else 3)
        for name, t in zip(case.NAMES, inputs):
            if name in needed:
                torch.testing.assert_close(t.grad, all_of_them[name], rtol=1e-11, atol=1e-11)
            else:
                assert t.grad is None


@forms
def test_values_that_are_not_finite_stay_in_their_member(form):
    case = form()
    inputs = case.inputs_for()
    expected = case.run(*inputs)
    inputs[0][1, 0, 0, 4, 4] = float("nan")
    actual = case.run(*inputs)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert not actual[1, 0].isfinite().all()
    assert actual[1, 1:].isfinite().all()


# --------------------------------------------------------------------------------------------------- memory formats


@forms
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("mode", ["eager", "grad", "compiled", "reference"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1", "k3"])
@images
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
def test_images_lie_as_those_of_conv2d(form, members, mode, kernel, shared, layout, weight_layout):
    case = form(members, kernel=kernel, shared=shared, layout=layout, weight_layout=weight_layout)
    inputs = case.inputs_for()
    x = inputs[0] if shared else inputs[0][0]
    weight = inputs[case.NAMES.index(case.WEIGHTS)]
    expected = F.conv2d(x, weight if weight.dim() == 4 else weight[0]).stride()
    if mode == "grad":
        inputs = leaves(inputs)
    torch.compiler.reset()  # sizes that were seen to change before would be symbols
    call = torch.compile(case.call, backend="aot_eager") if mode == "compiled" else case.call
    y = call(*inputs, backend="reference" if mode == "reference" else None)
    assert y[members - 1].stride() == expected
    assert y.stride(0) == y[0].numel() or members == 1


@forms
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1", "k3"])
def test_gradients_lie_as_their_tensors(form, layout, kernel):
    case = form(kernel=kernel, layout=layout, weight_layout=layout, options={"padding": "same"})
    inputs = case.inputs_for()
    actual = derivatives(case, inputs)
    for name, t in zip(case.NAMES, inputs):
        assert actual[name].stride() == t.stride()


# ------------------------------------------------------------------------------------------------------ derivatives


@small
def test_gradcheck(case):
    inputs = [t for t in leaves(case.inputs_for(torch.float64)) if t is not None]
    assert gradcheck(case.run, inputs, check_batched_grad=True)


@small
def test_gradgradcheck(case):
    inputs = [t for t in leaves(case.inputs_for(torch.float64)) if t is not None]
    many = case.FORM == "mixture"  # numbers, of all templates
    assert gradgradcheck(case.run, inputs, fast_mode=many)


@forms
@images
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("bias", ["own", "shared", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1", "k3"])
def test_saved_bytes(form, shared, dtype, bias, layout, kernel):
    """The arguments themselves but for the bias, and nothing else."""
    case = form(kernel=kernel, shared=shared, bias=bias, layout=layout, options={"padding": "same"})
    inputs = leaves(case.inputs_for(dtype))
    kept = kept_by(lambda: case.run(*inputs))
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(t.nbytes for t in inputs[:-1])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs[:-1]}


@forms
def test_nothing_is_saved_without_gradients(form):
    case = form()
    inputs = leaves(case.inputs_for())
    with torch.no_grad():
        assert kept_by(lambda: case.run(*inputs)) == []
    assert kept_by(lambda: case.run(*(t.detach() for t in inputs))) == []


@forms
def test_deterministic(form):
    case = form(11, 2, 40, 48, (6, 6))
    inputs = case.inputs_for(torch.bfloat16)
    first, second = (derivatives(case, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------- compilers and transforms


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@forms
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "settings",
    [
        {"options": {"padding": "same"}},
        {"shared": True, "bias": "shared", "options": {"stride": 2}},
        {"kernel": (2, 2), "options": {"padding": "same"}},
        {"op": "conv_transpose2d", "bias": "none"},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_compiled_equals_eager(form, settings):
    case = form(**settings)
    inputs = case.inputs_for()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    expected = derivatives(case, inputs)
    tensors = leaves(inputs)
    y = compiled(*tensors)
    torch.testing.assert_close(y, expected["y"], rtol=1e-4, atol=1e-5)
    y.sum().backward()
    for name, t in zip(case.NAMES, tensors):
        if t is not None:
            torch.testing.assert_close(t.grad, expected[name], rtol=1e-4, atol=1e-3)


@forms
@pytest.mark.usefixtures("fresh_compiler")
def test_any_batch_is_one_graph(form):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(form().call, fullgraph=True, dynamic=True, backend=counter)
    for batch in (20, 33, 17):  # below 16 images, PyTorch's convolution has a rule of its own
        inputs = form(batch=batch).inputs_for()
        torch.testing.assert_close(compiled(*inputs), form().run(*inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@forms
def test_export(form):
    case = form(options={"padding": 1})

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return case.run(*tensors)

    inputs = tuple(case.inputs_for()[:-1])
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs), rtol=1e-4, atol=1e-5)


@forms
def test_func_grad_and_vmap(form):
    case = form(shared=True)
    inputs = case.inputs_for(torch.float64)
    expected = derivatives(case, inputs)
    grads = torch.func.grad(lambda *args: case.run(*args).sum(), argnums=tuple(range(len(inputs))))(*inputs)
    for name, grad in zip(case.NAMES, grads):
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-11)
    for place, values in enumerate(inputs):  # the images, and each of what the weights are made of
        several = torch.stack([values, values * 2])
        y = torch.func.vmap(case.call, in_dims=tuple(0 if n == place else None for n in range(len(inputs))))(
            *inputs[:place], several, *inputs[place + 1 :]
        )
        alone = case.run(*inputs[:place], several[1], *inputs[place + 1 :])
        torch.testing.assert_close(y[1], alone, rtol=1e-11, atol=1e-11)


@forms
def test_forward_mode(form):
    case = form(shared=True)
    inputs = case.inputs_for(torch.float64)
    call = lambda *args: case.run(*args, backend="reference")  # noqa: E731
    tangents = tuple(torch.randn_like(t) for t in inputs)
    _, tangent = torch.func.jvp(call, tuple(inputs), tangents)
    h = 1e-6
    moved = [call(*(t + step * d for t, d in zip(inputs, tangents))) for step in (h, -h)]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * h), rtol=1e-6, atol=1e-6)


@forms
def test_per_sample_gradients(form):
    case = form(shared=True)
    x, *others = case.inputs_for(torch.float64)
    place = case.NAMES.index(case.WEIGHTS) - 1
    weights = others[place]

    def loss(weights, image):
        return case.run(image[None], *others[:place], weights, *others[place + 1 :]).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for image, grad in zip(x, grads):
        (expected,) = torch.autograd.grad(loss(weights.requires_grad_(), image), weights)
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


@forms
def test_meta_tensors(form):
    case = form(options={"padding": 1})
    inputs = [t.to("meta").requires_grad_() for t in case.inputs_for()]
    y = case.run(*inputs)
    assert (y.device.type, y.shape) == ("meta", (3, 4, 8, 9, 7))
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in inputs)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_autocast(form, dtype):
    """As conv2d: float32 goes to the dtype of autocast and float64 stays; backward may be called within or without."""
    case = form(options={"padding": 1})
    inputs = case.inputs_for(dtype)
    lowered = inputs if dtype == torch.float64 else [t.bfloat16() for t in inputs]
    expected = derivatives(case, lowered)
    for within in (True, False):
        tensors = leaves(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = case.run(*tensors)
            assert y.dtype == expected["y"].dtype
            if within:
                y.backward(torch.ones_like(y))
        if not within:
            y.backward(torch.ones_like(y))
        assert torch.equal(y, expected["y"])
        for name, t in zip(case.NAMES, tensors):
            assert t.grad.dtype == dtype
            assert torch.equal(t.grad, expected[name].to(dtype)), name


@forms
def test_inference_mode(form):
    case = form()
    inputs = case.inputs_for()
    with torch.inference_mode():
        assert torch.equal(case.run(*inputs), case.run(*inputs).clone())
    assert case.run(*leaves(inputs)).requires_grad
