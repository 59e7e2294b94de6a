"""BatchEnsemble convolutions: values and derivatives, memory formats, what is kept, and how PyTorch sees them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from common import leaves, name_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from effens_kernels import rank1_conv1d, rank1_conv2d, rank1_conv_transpose2d
from effens_kernels.ops import _member_convolution
from effens_kernels.ops.rank1_conv2d import folded
from effens_kernels.testing import DTYPES, assert_accurate

NAMES = ("x", "weight", "r", "s", "bias")
OPS = {
    "conv1d": (rank1_conv1d, F.conv1d),
    "conv2d": (rank1_conv2d, F.conv2d),
    "conv_transpose2d": (rank1_conv_transpose2d, F.conv_transpose2d),
}


@dataclass(frozen=True)
class Case:
    """One sample call, readable as a test id such as `E3-B4-C6-O8-9x7-k3x3-shared-stride2`."""

    members: int = 3
    batch: int = 4
    inputs: int = 6
    outputs: int = 8
    image: tuple[int, ...] = (9, 7)
    kernel: tuple[int, ...] = (3, 3)
    shared: bool = False
    bias: str = "own"  # "own", "shared" or "none"
    op: str = "conv2d"
    layout: str = "contiguous"  # of x; "channels_last", "batch_first" or "cropped"
    weight_layout: str = "contiguous"
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        sizes = [f"E{self.members}", f"B{self.batch}", f"C{self.inputs}", f"O{self.outputs}"]
        sizes += ["x".join(map(str, self.image)), "k" + "x".join(map(str, self.kernel))]
        parts = [self.op] * (self.op != "conv2d") + sizes + ["shared"] * self.shared
        parts += [f"bias_{self.bias}"] * (self.bias != "own") + [f"x_{self.layout}"] * (self.layout != "contiguous")
        parts += [f"w_{self.weight_layout}"] * (self.weight_layout != "contiguous")
        return "-".join(parts + [f"{name}{value}".replace(" ", "") for name, value in self.options.items()])

    @property
    def call(self):
        return OPS[self.op][0]

    @property
    def plain(self):
        return OPS[self.op][1]

    def inputs_for(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """Random (x, weight, r, s, bias), scaled so that outputs are of order 1."""
        groups = self.options.get("groups", 1)
        first, second = self.outputs, self.inputs // groups
        if "transpose" in self.op:
            first, second = self.inputs, self.outputs // groups
        terms = self.inputs // groups * torch.Size(self.kernel).numel()
        x = self._images(dtype)
        weight = laid_out(torch.randn(first, second, *self.kernel).mul(terms**-0.5).to(dtype), self.weight_layout)
        r, s = (torch.randn(self.members, n).mul(0.5).add(1).to(dtype) for n in (self.inputs, self.outputs))
        units = (self.outputs,) if self.bias == "shared" else (self.members, self.outputs)
        return [x, weight, r, s, None if self.bias == "none" else torch.randn(units).to(dtype)]

    def _images(self, dtype: torch.dtype) -> Tensor:
        x = torch.randn(1 if self.shared else self.members, self.batch, self.inputs, *self.image).to(dtype)
        if self.layout == "batch_first":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif self.layout == "cropped":
            x = F.pad(x, (1, 2))[..., 1:-2]
        elif self.layout == "channels_last":
            x = laid_out(x.flatten(0, 1), self.layout).view(x.shape)
        return x[0] if self.shared else x


def laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.mT.contiguous().mT if layout == "inner" else t


def cases() -> list[Case]:
    found = [
        Case(),
        Case(shared=True, bias="shared"),
        Case(bias="none"),
        Case(members=1),
        Case(members=1, shared=True, bias="none"),
        Case(1, 1, 1, 1, (1, 1), (1, 1)),
        Case(inputs=1, outputs=1),
        Case(inputs=17, outputs=13, image=(11, 5), kernel=(1, 1)),
        Case(inputs=5, outputs=3, image=(8, 8), kernel=(2, 4)),
        Case(inputs=3, outputs=16, image=(7, 7), kernel=(7, 7), shared=True),
        Case(11, 2, 40, 48, (6, 6)),  # more than one chunk of members
    ]
    several = [
        {"stride": 2},
        {"stride": (1, 3), "padding": (2, 1)},
        {"padding": 1, "dilation": 2},
        {"padding": (0, 2), "dilation": (1, 2)},
        {"groups": 2},
        {"groups": 2, "stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 1)},
        {"padding": "valid"},
        {"stride": [2], "padding": (1,)},
    ]
    for options in several:
        found += [Case(options=options), Case(shared=True, options=options, bias="shared")]
    found += [
        Case(inputs=8, options={"groups": 8}),  # depthwise
        Case(kernel=(4, 2), options={"padding": "same"}),  # uneven
        Case(kernel=(2, 3), options={"padding": "same", "dilation": (3, 1)}, shared=True),
    ]
    for layout in ("channels_last", "batch_first", "cropped"):
        found += [Case(layout=layout), Case(layout=layout, shared=True, options={"padding": 1})]
    found += [
        Case(layout="channels_last", weight_layout="channels_last", options={"stride": 2}),
        Case(weight_layout="channels_last", options={"groups": 2}),
        Case(kernel=(1, 1), layout="channels_last", weight_layout="channels_last"),
        Case(kernel=(1, 1), layout="channels_last", shared=True, bias="shared"),
        Case(kernel=(1, 1), layout="channels_last", options={"padding": 1}),
        Case(kernel=(1, 1), layout="channels_last", options={"groups": 2}, bias="none"),
        Case(inputs=1, kernel=(1, 1), layout="channels_last"),
        Case(weight_layout="inner"),
    ]
    line = {"image": (13,), "kernel": (3,), "op": "conv1d"}
    found += [
        Case(**line),
        Case(**line, shared=True, options={"stride": 2, "padding": 1, "groups": 2}),
        Case(**line, options={"padding": "same", "dilation": 2}, weight_layout="channels_last"),
    ]
    for options in ({}, {"stride": 2, "output_padding": 1}, {"groups": 2, "padding": (1, 0), "dilation": (1, 2)}):
        found += [
            Case(op="conv_transpose2d", options=options),
            Case(op="conv_transpose2d", options=options, shared=True),
        ]
    found += [Case(op="conv_transpose2d", layout="channels_last", weight_layout="channels_last")]
    return found


CASES = cases()
EMPTY = [
    Case(batch=0),
    Case(batch=0, shared=True, options={"groups": 2}),
    Case(members=0),
    Case(members=0, shared=True, bias="shared"),
    Case(members=0, batch=0),
    Case(members=1, batch=0, layout="channels_last"),
    Case(batch=0, kernel=(1, 1), layout="channels_last"),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
SMALL = [
    Case(2, 1, 2, 2, (2, 3), (2, 2), options={"padding": 1}),
    Case(2, 2, 2, 2, (3, 3), (3, 2), shared=True, bias="shared", options={"stride": 2, "padding": 1}),
    Case(1, 1, 4, 2, (3, 3), (2, 2), bias="none", options={"groups": 2}, layout="channels_last"),
    Case(2, 1, 2, 2, (4, 3), (2, 3), options={"padding": "same"}),
    Case(2, 2, 3, 2, (2, 2), (1, 1), layout="channels_last"),
    Case(2, 2, 3, 2, (2, 2), (1, 1), layout="channels_last", shared=True, bias="shared"),
    Case(2, 2, 2, 2, (4,), (2,), op="conv1d"),
    Case(2, 1, 2, 2, (2, 2), (2, 2), op="conv_transpose2d", options={"groups": 2, "stride": 2}),
]
small = pytest.mark.parametrize("case", SMALL, ids=str)


def derivatives(case: Case, inputs: list[Tensor | None], grad: Tensor | None = None, **options) -> dict[str, Tensor]:
    inputs = leaves(inputs)
    y = case.call(*inputs, **case.options, **options)
    named = {name: t for name, t in zip(NAMES, inputs) if t is not None}
    grads = torch.autograd.grad(y, list(named.values()), torch.ones_like(y) if grad is None else grad)
    return {"y": y.detach(), **dict(zip(named, grads))}


def widened(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in inputs]


def terms(case: Case, name: str) -> int:
    """Upper bounds of how many products are summed into one element."""
    kernel, pixels = torch.Size(case.kernel).numel(), 2 * torch.Size(case.image).numel() * case.batch
    return {
        "y": case.inputs * kernel,
        "x": case.outputs * kernel * case.members,
        "weight": pixels * case.members,
        "r": pixels * case.outputs * kernel,
        "s": pixels * case.inputs * kernel,
        "bias": pixels * case.members,
    }[name]


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_a_loop_over_members(case):
    x, weight, r, s, bias = case.inputs_for(torch.float64)
    expected = []
    for e in range(case.members):
        scaled = (x if case.shared else x[e]) * r[e].view(-1, *(1 for _ in case.image))
        own = None if bias is None else bias if case.bias == "shared" else bias[e]
        y = case.plain(scaled, weight, None, **case.options) * s[e].view(-1, *(1 for _ in case.image))
        expected.append(y if own is None else y + own.view(-1, *(1 for _ in case.image)))
    actual = case.call(x, weight, r, s, bias, **case.options, backend="reference")
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=1e-12)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    inputs = case.inputs_for(dtype)
    with torch.no_grad():
        grad = torch.randn_like(case.call(*inputs, **case.options, backend="reference"))
    exact = derivatives(case, widened(inputs), grad.double(), backend="reference")
    composition = derivatives(case, inputs, grad, backend="reference")
    actual = derivatives(case, inputs, grad)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_accurate(value, exact[name], composition[name], name, terms(case, name))
    with torch.no_grad():
        assert torch.equal(case.call(*inputs, **case.options), actual["y"])


@dtypes
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_sizes(case, dtype):
    inputs = case.inputs_for(dtype)
    actual, expected = derivatives(case, inputs), derivatives(case, inputs, backend="reference")
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert actual[name].dtype == dtype
        assert not actual[name].any()


@pytest.mark.parametrize(
    "needed", [(n,) for n in NAMES] + [("x", "bias"), ("r", "s"), ("weight", "bias")], ids="-".join
)
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
def test_only_needed_gradients(needed, shared):
    """Each by itself is what it is among all of them, and the convolution's backward is asked for nothing more."""
    case = Case(shared=shared, options={"padding": 1})
    inputs = case.inputs_for(torch.float64)
    all_of_them = derivatives(case, inputs)
    inputs = [t.requires_grad_(name in needed) for name, t in zip(NAMES, inputs)]
    y = case.call(*inputs, **case.options)
    masks = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.convolution_backward.default:
                masks.append(arguments[-1])
            return function(*arguments, **(options or {}))

    real = _member_convolution.is_plain_eager
    _member_convolution.is_plain_eager = lambda *_: True  # the watch itself would be seen
    try:
        with Watch():
            y.backward(torch.ones_like(y))
    finally:
        _member_convolution.is_plain_eager = real
    kernel = not {"weight", "r", "s"}.isdisjoint(needed)
    assert masks == [["x" in needed, kernel, kernel and "bias" in needed]] * (0 if needed == ("bias",) else 3)
    for name, t in zip(NAMES, inputs):
        if name in needed:
            torch.testing.assert_close(t.grad, all_of_them[name], rtol=1e-11, atol=1e-11)
        else:
            assert t.grad is None


def test_scales_of_zero_and_values_that_are_not_finite_stay_in_their_member():
    inputs = Case().inputs_for()
    expected = rank1_conv2d(*inputs)
    inputs[2][1, 2] = 0
    inputs[3][1, 3] = 0
    assert torch.equal(rank1_conv2d(*inputs)[[0, 2]], expected[[0, 2]])
    inputs[0][1, 0, 0, 4, 4] = float("nan")
    actual = rank1_conv2d(*inputs)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert not actual[1, 0].isfinite().all()
    assert actual[1, 1:].isfinite().all()


# --------------------------------------------------------------------------------------------------- memory formats


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("mode", ["eager", "grad", "compiled", "reference"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1", "k3"])
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
def test_images_lie_as_those_of_conv2d(members, mode, kernel, shared, layout, weight_layout):
    case = Case(members, kernel=kernel, shared=shared, layout=layout, weight_layout=weight_layout)
    inputs = case.inputs_for()
    x = inputs[0] if shared else inputs[0][0]
    expected = F.conv2d(x, inputs[1]).stride()
    if mode == "grad":
        inputs = leaves(inputs)
    call = torch.compile(rank1_conv2d, backend="aot_eager") if mode == "compiled" else rank1_conv2d
    y = call(*inputs, backend="reference" if mode == "reference" else None)
    assert y[members - 1].stride() == expected
    assert y.stride(0) == y[0].numel() or members == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1", "k3"])
def test_gradients_lie_as_their_tensors(layout, kernel):
    case = Case(kernel=kernel, layout=layout, weight_layout=layout, options={"padding": "same"})
    inputs = case.inputs_for()
    actual = derivatives(case, inputs)
    assert actual["x"].stride() == inputs[0].stride()
    assert actual["weight"].stride() == inputs[1].stride()


# ------------------------------------------------------------------------------------------------------ derivatives


@small
def test_gradcheck(case):
    inputs = leaves(case.inputs_for(torch.float64))
    call = lambda *tensors: case.call(*tensors, *([None] * (5 - len(tensors))), **case.options)  # noqa: E731
    assert gradcheck(call, [t for t in inputs if t is not None], check_batched_grad=True)


@small
def test_gradgradcheck(case):
    inputs = leaves(case.inputs_for(torch.float64))
    call = lambda *tensors: case.call(*tensors, *([None] * (5 - len(tensors))), **case.options)  # noqa: E731
    assert gradgradcheck(call, [t for t in inputs if t is not None])


def test_one_tensor_in_two_places():
    """r and s may be one tensor, and depend on x; a gradient penalty then has every path."""
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)

    def penalty(x, backend):
        scale = x.mean((1, 3, 4))
        (grad,) = torch.autograd.grad(
            rank1_conv2d(x, weight, scale, scale, backend=backend).square().sum(), x, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty(x, None), penalty(x, "reference"), rtol=1e-11, atol=1e-9)


def kept_by(call) -> list[Tensor]:
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("bias", ["own", "shared", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1", "k3"])
def test_saved_bytes(shared, dtype, bias, layout, kernel):
    """x, weight, r and s themselves, and nothing else."""
    case = Case(kernel=kernel, shared=shared, bias=bias, layout=layout, options={"padding": "same"})
    inputs = leaves(case.inputs_for(dtype))
    kept = kept_by(lambda: rank1_conv2d(*inputs, **case.options))
    assert sum(t.untyped_storage().nbytes() for t in kept) == sum(t.nbytes for t in inputs[:4])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs[:4]}


def test_nothing_is_saved_without_gradients():
    inputs = leaves(Case().inputs_for())
    with torch.no_grad():
        assert kept_by(lambda: rank1_conv2d(*inputs)) == []
    assert kept_by(lambda: rank1_conv2d(*(t.detach() for t in inputs))) == []


def test_deterministic():
    inputs = Case(11, 2, 40, 48, (6, 6)).inputs_for(torch.bfloat16)
    first, second = (derivatives(Case(), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------- compilers and transforms


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "case",
    [
        Case(options={"padding": "same"}),
        Case(shared=True, bias="shared", options={"stride": 2}),
        Case(kernel=(2, 2), options={"padding": "same"}),
        Case(op="conv_transpose2d", bias="none"),
    ],
    ids=str,
)
def test_compiled_equals_eager(case):
    inputs = case.inputs_for()
    compiled = torch.compile(lambda *args: case.call(*args, **case.options), fullgraph=True, backend="aot_eager")
    expected = derivatives(case, inputs)
    tensors = leaves(inputs)
    y = compiled(*tensors)
    torch.testing.assert_close(y, expected["y"], rtol=1e-4, atol=1e-5)
    y.sum().backward()
    for name, t in zip(NAMES, tensors):
        if t is not None:
            torch.testing.assert_close(t.grad, expected[name], rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("fresh_compiler")
def test_any_batch_is_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rank1_conv2d, fullgraph=True, dynamic=True, backend=counter)
    for batch in (10, 17, 11):  # below 16 images in all, PyTorch's convolution has a rule of its own
        inputs = Case(batch=batch).inputs_for()
        torch.testing.assert_close(compiled(*inputs), rank1_conv2d(*inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, r, s):
            return rank1_conv2d(x, weight, r, s, padding=1)

    inputs = tuple(Case().inputs_for()[:4])
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs), rtol=1e-4, atol=1e-5)


def test_func_grad_and_vmap():
    inputs = Case(shared=True).inputs_for(torch.float64)
    expected = derivatives(Case(), inputs)
    grads = torch.func.grad(lambda *args: rank1_conv2d(*args).sum(), argnums=(0, 1, 2, 3, 4))(*inputs)
    for name, grad in zip(NAMES, grads):
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-11)
    several = torch.stack([inputs[0], inputs[0] * 2])
    y = torch.func.vmap(rank1_conv2d, in_dims=(0, None, None, None, None))(several, *inputs[1:])
    torch.testing.assert_close(y[1], rank1_conv2d(several[1], *inputs[1:]), rtol=1e-11, atol=1e-11)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    _, tangent = torch.func.jvp(rank1_conv2d, tuple(inputs), tangents)
    h = 1e-6
    moved = [rank1_conv2d(*(t + step * d for t, d in zip(inputs, tangents))) for step in (h, -h)]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / (2 * h), rtol=1e-6, atol=1e-6)


def test_per_sample_gradients():
    inputs = Case(shared=True).inputs_for(torch.float64)
    x, weight, *others = inputs

    def loss(weight, image):
        return rank1_conv2d(image[None], weight, *others).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for image, grad in zip(x, grads):
        (expected,) = torch.autograd.grad(loss(weight.requires_grad_(), image), weight)
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


def test_meta_tensors():
    inputs = [t.to("meta").requires_grad_() for t in Case().inputs_for()]
    y = rank1_conv2d(*inputs, padding=1)
    assert (y.device.type, y.shape) == ("meta", (3, 4, 8, 9, 7))
    y.sum().backward()
    assert inputs[2].grad.shape == (3, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_autocast(dtype):
    """As conv2d: float32 goes to the dtype of autocast and float64 stays; backward may be called within or without."""
    case = Case(options={"padding": 1})
    inputs = case.inputs_for(dtype)
    lowered = inputs if dtype == torch.float64 else [t.bfloat16() for t in inputs]
    expected = derivatives(case, lowered)
    for within in (True, False):
        tensors = leaves(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = rank1_conv2d(*tensors, padding=1)
            assert y.dtype == F.conv2d(tensors[0][0], tensors[1]).dtype
            if within:
                y.backward(torch.ones_like(y))
        if not within:
            y.backward(torch.ones_like(y))
        assert torch.equal(y, expected["y"])
        for name, t in zip(NAMES, tensors):
            assert t.grad.dtype == dtype
            assert torch.equal(t.grad, expected[name].to(dtype)), name


def test_inference_mode():
    inputs = Case().inputs_for()
    with torch.inference_mode():
        assert torch.equal(rank1_conv2d(*inputs), rank1_conv2d(*inputs).clone())
    assert rank1_conv2d(*leaves(inputs)).requires_grad


# --------------------------------------------------------------------------------------------------------- dispatch


def test_pointwise_convolutions_are_linear_layers_of_pixels(monkeypatch):
    """On the CPU engine, where it runs; else folded."""
    inputs = Case(kernel=(1, 1), layout="channels_last").inputs_for()
    monkeypatch.setattr(folded, "apply", lambda *_: "folded")
    assert isinstance(rank1_conv2d(*inputs), Tensor)
    assert rank1_conv2d(*inputs, stride=2) == "folded"
    assert rank1_conv2d(inputs[0].contiguous(), *inputs[1:]) == "folded"
    monkeypatch.setattr("effens_kernels._dispatch.selects", lambda *_: False)
    assert rank1_conv2d(*inputs) == "folded"


def test_backend_from_the_environment(monkeypatch):
    """EFFENS_BACKEND counts as a named backend: the reference, or a refusal."""
    inputs = Case().inputs_for(torch.bfloat16)
    monkeypatch.setattr("effens_kernels._env.BACKEND", "reference")
    assert torch.equal(rank1_conv2d(*inputs), rank1_conv2d(*inputs, backend="reference"))
    monkeypatch.setattr("effens_kernels._env.BACKEND", "cpu")
    with pytest.raises(ValueError, match="rank1_conv2d: backend 'cpu' cannot run this call"):
        rank1_conv2d(*inputs)
