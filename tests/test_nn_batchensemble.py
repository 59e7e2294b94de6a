"""BatchEnsemble layers equal PyTorch's operations on scaled inputs, in every layout, and keep what they come from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effens_kernels.nn import (
    BatchEnsembleConv1d,
    BatchEnsembleConv2d,
    BatchEnsembleConvTranspose2d,
    BatchEnsembleLinear,
    EnsembleLinear,
)
from effens_kernels.ops._activations import ACTIVATIONS

E, B, I, O = 3, 10, 7, 4
DOUBLE = {"dtype": torch.float64}
LAYOUTS = {"members_first": {}, "batch_first": {"batch_first": True}, "tiled": {"tiled": True}}
BIASES = {"own_bias": {}, "shared_bias": {"shared_bias": True}, "no_bias": {"bias": False}}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
biases = pytest.mark.parametrize("bias", BIASES)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def stored(t: Tensor, layout: str) -> Tensor:
    """[E, B, ...] as the layer takes it and gives it."""
    return {"members_first": t, "batch_first": t.transpose(0, 1), "tiled": t.flatten(0, 1)}[layout]


def bias_of(layer: nn.Module, e: int) -> Tensor | None:
    return layer.bias if layer.bias is None or layer.bias.dim() == 1 else layer.bias[e]


def linear(layer: BatchEnsembleLinear, x: Tensor, e: int) -> Tensor:
    """What member e is, in PyTorch's operations."""
    y = F.linear(x * layer.r[e], layer.weight) * layer.s[e]
    bias = bias_of(layer, e)
    return ACTIVATIONS[layer.activation].apply(y if bias is None else y + bias)


def conv(layer: nn.Module, x: Tensor, e: int) -> Tensor:
    names = "stride", "padding", "output_padding", "dilation", "groups", "padding_mode"
    how = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    kind = getattr(nn, type(layer).__name__.removeprefix("BatchEnsemble"))
    plain = kind(layer.in_channels, layer.out_channels, layer.kernel_size, bias=False, **how)
    r, s = (t[e].view(-1, *(1,) * len(layer.kernel_size)) for t in (layer.r, layer.s))
    y = torch.func.functional_call(plain, {"weight": layer.weight}, x * r) * s
    bias = bias_of(layer, e)
    return y if bias is None else y + bias.view(s.shape)


LAYERS = {
    "Linear": (lambda **o: BatchEnsembleLinear(I, O, E, **o), linear, (I,)),
    "Linear-gelu": (lambda **o: BatchEnsembleLinear(I, O, E, activation="gelu", **o), linear, (I,)),
    "Conv2d": (lambda **o: BatchEnsembleConv2d(4, 6, 3, E, **o), conv, (4, 8, 7)),
    "Conv2d-groups": (lambda **o: BatchEnsembleConv2d(4, 6, (3, 2), E, (2, 1), 1, 2, 2, **o), conv, (4, 8, 7)),
    "Conv2d-same": (lambda **o: BatchEnsembleConv2d(4, 6, 3, E, padding="same", dilation=2, **o), conv, (4, 8, 7)),
    "Conv2d-circular": (
        lambda **o: BatchEnsembleConv2d(4, 6, (3, 2), E, padding=(1, 2), padding_mode="circular", **o),
        conv,
        (4, 8, 7),
    ),
    "Conv2d-reflect": (
        lambda **o: BatchEnsembleConv2d(4, 6, (2, 3), E, padding="same", padding_mode="reflect", **o),
        conv,
        (4, 8, 7),
    ),
    "Conv1d": (lambda **o: BatchEnsembleConv1d(4, 6, 3, E, 2, 1, groups=2, **o), conv, (4, 9)),
    "Conv1d-circular": (
        lambda **o: BatchEnsembleConv1d(4, 6, 2, E, padding=2, padding_mode="circular", **o),
        conv,
        (4, 9),
    ),
    "ConvTranspose2d": (
        lambda **o: BatchEnsembleConvTranspose2d(4, 6, (3, 2), E, (2, 1), 1, (1, 0), 2, **o),
        conv,
        (4, 5, 4),
    ),
}
layers = pytest.mark.parametrize("name", LAYERS)


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@layers
@layouts
@biases
def test_a_loop_over_members(name, layout, bias):
    """Rows for each member, the same rows, and each member alone; forward and backward."""
    make, member, features = LAYERS[name]
    layer = make(**LAYOUTS[layout], **BIASES[bias], **DOUBLE)
    x = torch.randn(E, B, *features, **DOUBLE, requires_grad=True)
    expected = torch.stack([member(layer, x[e], e) for e in range(E)])
    pairs = [(layer(stored(x, layout)), stored(expected, layout))]
    if layout != "tiled":
        pairs.append((layer(x[0]), stored(torch.stack([member(layer, x[0], e) for e in range(E)]), layout)))
    for actual, expected in pairs:
        close(actual, expected)
        grad = torch.randn_like(expected)
        inputs = [x, *layer.parameters()]
        for a, b in zip(*(torch.autograd.grad((t * grad).sum(), inputs) for t in (actual, expected))):
            close(a, b)
    for e in range(-E, E):
        close(layer(x[0], member=e), member(layer, x[0], e % E))


@layers
def test_gradient_through_one_member(name):
    make, _, features = LAYERS[name]
    layer = make(**DOUBLE)
    layer(torch.randn(B, *features, **DOUBLE), member=1).square().sum().backward()
    for parameter in (layer.r, layer.s, layer.bias):
        assert parameter.grad[1].any()
        assert not parameter.grad[[0, 2]].any()
    assert layer.weight.grad.any()


@biases
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_folded_weights_in_an_ensemble_linear(bias, activation):
    layer = BatchEnsembleLinear(I, O, E, activation=activation, **BIASES[bias], **DOUBLE)
    weight, folded_bias = layer.fold()
    assert weight.shape == (E, O, I)
    plain = EnsembleLinear(I, O, E, bias != "no_bias", activation=activation, **DOUBLE)
    plain.load_state_dict({"weight": weight} if folded_bias is None else {"weight": weight, "bias": folded_bias})
    x = torch.randn(E, B, I, **DOUBLE)
    close(plain(x), layer(x))


def test_folded_weights_of_transposed_convolutions():
    layer = BatchEnsembleConvTranspose2d(4, 6, 3, E, groups=2, **DOUBLE)
    x = torch.randn(B, 4, 5, 4, **DOUBLE)
    y = layer(x)
    for e in range(E):
        weight, bias = layer.fold(e)
        close(F.conv_transpose2d(x, weight, bias, groups=2), y[e])


def test_size_of_a_transposed_convolution():
    plain = nn.ConvTranspose2d(4, 6, 3, 2, 1, **DOUBLE)
    layer = BatchEnsembleConvTranspose2d.from_conv(plain, E, init="ones")
    x = torch.randn(B, 4, 5, 4, **DOUBLE)
    for size in ([9, 8], [10, 7], [B, 6, 9, 7]):
        close(layer(x, size)[1], plain(x, size))
    for size in ([11, 8], [9, 6], [9]):
        with pytest.raises(ValueError, match=r"output_size should be from \[9, 7\] to \[10, 8\], got"):
            layer(x, size)


@biases
@pytest.mark.parametrize("groups", [1, 2])
def test_folded_weights_of_convolutions(bias, groups):
    layer = BatchEnsembleConv2d(4, 6, 3, E, groups=groups, **BIASES[bias], **DOUBLE)
    weight, folded_bias = layer.fold()
    assert weight.shape == (E, 6, 4 // groups, 3, 3)
    x = torch.randn(B, 4, 8, 7, **DOUBLE)
    for e, y in enumerate(layer(x)):
        close(F.conv2d(x, weight[e], None if folded_bias is None else folded_bias[e], groups=groups), y)


def test_folded_weights_are_differentiable_and_rounded_once():
    layer = BatchEnsembleLinear(I, O, E, **DOUBLE)
    weight, bias = layer.fold()
    (weight.square().sum() + bias.sum()).backward()
    close(layer.r.grad, 2 * torch.einsum("ei,eo,oi->ei", layer.r, layer.s.square(), layer.weight.square()).detach())
    assert torch.equal(layer.bias.grad, torch.ones(E, O, **DOUBLE))
    low = BatchEnsembleLinear(I, O, E, dtype=torch.bfloat16)
    exact = low.weight.double() * low.s.double().unsqueeze(-1) * low.r.double().unsqueeze(1)
    error = (low.fold()[0].double() - exact).abs() / exact.abs()
    assert error.max() <= 2**-8 * 1.001


# --------------------------------------------------------------------------------------------------- initialization


@biases
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weight_and_bias_are_drawn_as_those_of_torch(kind, bias, seed):
    torch.manual_seed(seed)
    layer = LAYERS["Linear" if kind == "linear" else "Conv2d"][0](**BIASES[bias])
    torch.manual_seed(seed)
    plain = nn.Linear(I, O, bias != "no_bias") if kind == "linear" else nn.Conv2d(4, 6, 3, bias=bias != "no_bias")
    assert torch.equal(layer.weight, plain.weight)
    if bias == "no_bias":
        assert layer.bias is None
    elif bias == "shared_bias":
        assert torch.equal(layer.bias, plain.bias)
    else:
        assert layer.bias.shape == (E, plain.bias.numel())
        assert torch.equal(layer.bias[0], plain.bias)
        bound = plain.weight[0].numel() ** -0.5
        assert layer.bias.abs().max() <= bound
        assert not torch.equal(layer.bias[0], layer.bias[1])


def test_scales():
    for make in (
        lambda **o: BatchEnsembleLinear(400, 300, 4, **o),
        lambda **o: BatchEnsembleConv2d(400, 300, 1, 4, **o),
    ):
        layer = make(std=0.2)
        for scale, size in ((layer.r, 400), (layer.s, 300)):
            assert scale.shape == (4, size)
            assert abs(scale.mean().item() - 1) < 0.05
            assert abs(scale.std().item() - 0.2) < 0.04
        layer = make(init="random_sign")
        for scale in (layer.r, layer.s):
            assert set(scale.unique().tolist()) == {-1.0, 1.0}
            assert abs(scale.mean().item()) < 0.2
        layer = make(init="ones")
        assert torch.equal(layer.r, torch.ones(4, 400))
        assert torch.equal(layer.s, torch.ones(4, 300))
        assert all(p.requires_grad for p in layer.parameters())


@layers
def test_reset_parameters_draws_again(name, seed):
    torch.manual_seed(seed)
    layer = LAYERS[name][0]()
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(value, first[key]) for key, value in layer.state_dict().items())
    torch.manual_seed(seed)
    layer.reset_parameters()
    assert all(torch.equal(value, first[key]) for key, value in layer.state_dict().items())


# --------------------------------------------------------------------------------------------- from plain layers


@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_linear(bias, shared_bias, dtype):
    plain = nn.Linear(I, O, bias, dtype=dtype).eval()
    plain.weight.requires_grad_(False)
    options = {"shared_bias": shared_bias, "activation": "relu", "batch_first": True}
    layer = BatchEnsembleLinear.from_linear(plain, E, init="ones", **options)
    check_kept(plain, layer, dtype, shared_bias)
    x = torch.randn(B, I, dtype=dtype)
    y = layer(x)
    assert y.shape == (B, E, O)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y, F.relu(plain(x)).unsqueeze(1).expand(y.shape), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "groups": 2, "bias": False},
        {"padding": "same", "dilation": (1, 2), "padding_mode": "circular"},
        {"stride": (1, 2), "padding": (2, 1), "padding_mode": "replicate", "dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_from_conv(options, shared_bias, memory_format):
    plain = nn.Conv2d(4, 6, (3, 2), **options).to(memory_format=memory_format)
    plain.weight.requires_grad_(False)
    layer = BatchEnsembleConv2d.from_conv(plain, E, init="ones", shared_bias=shared_bias)
    check_kept(plain, layer, plain.weight.dtype, shared_bias)
    assert layer.weight.stride() == plain.weight.stride()
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(layer, name) == getattr(plain, name)
    x = torch.randn(B, 4, 8, 7, dtype=plain.weight.dtype)
    torch.testing.assert_close(layer(x), plain(x).expand(E, -1, -1, -1, -1), rtol=1e-4, atol=1e-5)


def check_kept(plain: nn.Module, layer: nn.Module, dtype: torch.dtype, shared_bias: bool) -> None:
    assert torch.equal(layer.weight, plain.weight)
    assert not layer.weight.requires_grad
    assert layer.weight.data_ptr() != plain.weight.data_ptr()
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.training == plain.training
    assert layer.r.requires_grad
    assert layer.s.requires_grad
    if plain.bias is None:
        assert layer.bias is None
        return
    assert layer.bias.requires_grad
    assert layer.bias.shape == (plain.bias.shape if shared_bias else (E, *plain.bias.shape))
    assert torch.equal(layer.bias, plain.bias.expand(layer.bias.shape))
    assert layer.bias.data_ptr() != plain.bias.data_ptr()


def test_from_layers_on_meta():
    layer = BatchEnsembleLinear.from_linear(nn.Linear(I, O, device="meta"), E)
    assert {p.device.type for p in layer.parameters()} == {"meta"}


# --------------------------------------------------------------------------------------------------- as nn.Modules


@layers
def test_state_dict_keys(name):
    make = LAYERS[name][0]
    assert list(make().state_dict()) == ["weight", "r", "s", "bias"]
    assert list(make(bias=False).state_dict()) == ["weight", "r", "s"]


REPRS = {
    "BatchEnsembleLinear(in_features=7, out_features=4, num_members=3, bias=True, init='normal', std=0.5)": (
        lambda: BatchEnsembleLinear(I, O, E)
    ),
    "BatchEnsembleLinear(in_features=7, out_features=4, num_members=3, bias=True, init='ones', shared_bias=True, "
    "activation='relu', tiled=True)": (
        lambda: BatchEnsembleLinear(I, O, E, init="ones", shared_bias=True, activation="relu", tiled=True)
    ),
    "BatchEnsembleConv2d(in_channels=4, out_channels=6, kernel_size=(3, 3), num_members=3, stride=(1, 1), bias=False, "
    "init='random_sign', batch_first=True)": (
        lambda: BatchEnsembleConv2d(4, 6, 3, E, bias=False, init="random_sign", batch_first=True)
    ),
    "BatchEnsembleConv2d(in_channels=4, out_channels=6, kernel_size=(3, 2), num_members=3, stride=(1, 1), "
    "padding='same', groups=2, padding_mode='circular', bias=True, init='normal', std=0.5)": (
        lambda: BatchEnsembleConv2d(4, 6, (3, 2), E, padding="same", groups=2, padding_mode="circular")
    ),
}


@pytest.mark.parametrize("text", REPRS)
def test_repr(text):
    assert repr(REPRS[text]()) == text


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("name", ["Linear", "Conv2d-groups"])
def test_copies(name, how, tmp_path):
    make, _, features = LAYERS[name]
    original = make()
    x = torch.randn(B, *features)
    expected = original(x)
    if how == "deepcopy":
        other = copy.deepcopy(original)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    else:
        torch.save(original.state_dict(), tmp_path / "state.pt")
        other = make()
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x), expected)


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_to(name, dtype):
    make, _, features = LAYERS[name]
    layer = make(dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(B, *features, dtype=dtype)).dtype == dtype
    assert layer.to(torch.float32)(torch.randn(B, *features)).dtype == torch.float32


@layers
def test_device_argument(name):
    make, _, features = LAYERS[name]
    layer = make(device="meta")
    assert layer(torch.randn(B, *features, device="meta")).shape[:2] == (E, B)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.randn(B, *features)).isfinite().all()


def test_channels_last_images_stay_so():
    layer = BatchEnsembleConv2d(4, 6, 3, E, tiled=True).to(memory_format=torch.channels_last)
    y = layer(torch.randn(E * B, 4, 8, 7).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["Linear", "Conv2d-same"])
@layouts
def test_compiled(name, layout):
    torch._dynamo.reset()
    make, _, features = LAYERS[name]
    layer = make(**LAYOUTS[layout])
    x = stored(torch.randn(E, B, *features), layout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_training_lets_members_part(seed):
    """All members begin as one, and learn targets of their own through their scales."""
    torch.manual_seed(seed)
    layer = BatchEnsembleLinear.from_linear(nn.Linear(I, O), E, init="ones")
    x, target = torch.randn(64, I), torch.randn(E, 64, O)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(layer.r[0], layer.r[1])


# -------------------------------------------------------------------------------------------------------- bad input

CONV, LINEAR = BatchEnsembleConv2d, BatchEnsembleLinear
BAD_CONSTRUCTION = {
    "linear_in_0": (lambda: LINEAR(0, O, E), ValueError, "BatchEnsembleLinear: in_features should be at least 1"),
    "linear_out_float": (lambda: LINEAR(I, 4.0, E), TypeError, "out_features should be an int, got 4.0"),
    "linear_members_0": (lambda: LINEAR(I, O, 0), ValueError, "BatchEnsembleLinear: num_members should be at least 1"),
    "linear_members_bool": (lambda: LINEAR(I, O, True), TypeError, "num_members should be an int, got True"),
    "linear_activation": (lambda: LINEAR(I, O, E, activation="elu"), ValueError, "BatchEnsembleLinear: activation"),
    "linear_init": (lambda: LINEAR(I, O, E, init="zeros"), ValueError, "init should be one of 'normal', 'random_sign"),
    "linear_init_list": (lambda: LINEAR(I, O, E, init=["ones"]), ValueError, "init should be one of"),
    "linear_std_negative": (lambda: LINEAR(I, O, E, std=-1), ValueError, "std should be finite and at least 0, got -1"),
    "linear_std_nan": (lambda: LINEAR(I, O, E, std=float("nan")), ValueError, "std should be finite and at least 0"),
    "linear_std_word": (lambda: LINEAR(I, O, E, std="1"), TypeError, "std should be a number, got '1'"),
    "linear_layouts": (
        lambda: LINEAR(I, O, E, batch_first=True, tiled=True),
        ValueError,
        "BatchEnsembleLinear: tiled should be False with batch_first=True, got True",
    ),
    "from_linear": (lambda: LINEAR.from_linear(nn.Conv2d(1, 1, 1), E), TypeError, "a torch.nn.Linear, got Conv2d"),
    "from_linear_members": (lambda: LINEAR.from_linear(nn.Linear(I, O), 0), ValueError, "num_members should be at le"),
    "conv_in_0": (lambda: CONV(0, 6, 3, E), ValueError, "BatchEnsembleConv2d: in_channels should be at least 1"),
    "conv_members_none": (lambda: CONV(4, 6, 3, None), TypeError, "num_members should be an int, got None"),
    "conv_groups": (
        lambda: CONV(4, 6, 3, E, groups=3),
        ValueError,
        "in_channels should be a multiple of groups=3, got",
    ),
    "conv_groups_out": (
        lambda: CONV(4, 6, 3, E, groups=4),
        ValueError,
        "out_channels should be a multiple of groups=4",
    ),
    "conv_kernel_0": (lambda: CONV(4, 6, 0, E), ValueError, "kernel_size should be an int of at least 1, or 2 of them"),
    "conv_kernel_3": (lambda: CONV(4, 6, (1, 2, 3), E), ValueError, "kernel_size should be an int of at least 1, or 2"),
    "conv_stride_float": (lambda: CONV(4, 6, 3, E, 1.5), TypeError, "stride should be an int of at least 1, or 2"),
    "conv_dilation_0": (lambda: CONV(4, 6, 3, E, dilation=0), ValueError, "dilation should be an int of at least 1"),
    "conv_padding_negative": (lambda: CONV(4, 6, 3, E, padding=-1), ValueError, "padding should be an int of at least"),
    "conv_padding_word": (lambda: CONV(4, 6, 3, E, padding="full"), ValueError, "padding should be numbers, 'same' or"),
    "conv_padding_same": (lambda: CONV(4, 6, 3, E, 2, "same"), ValueError, "numbers or 'valid' with stride (2, 2)"),
    "conv_mode": (lambda: CONV(4, 6, 3, E, padding_mode="mirror"), ValueError, "padding_mode should be one of 'zeros'"),
    "conv_layouts": (
        lambda: CONV(4, 6, 3, E, batch_first=True, tiled=True),
        ValueError,
        "BatchEnsembleConv2d: tiled should be False",
    ),
    "from_conv": (
        lambda: CONV.from_conv(nn.Linear(I, O), E),
        TypeError,
        "conv should be a torch.nn.Conv2d, got Linear",
    ),
    "transpose_mode": (
        lambda: BatchEnsembleConvTranspose2d(4, 6, 3, E, padding_mode="reflect"),
        ValueError,
        "BatchEnsembleConvTranspose2d: padding_mode should be 'zeros', got 'reflect'",
    ),
    "transpose_output_padding": (
        lambda: BatchEnsembleConvTranspose2d(4, 6, 3, E, output_padding=1),
        ValueError,
        "output_padding should be less than stride (1, 1) or dilation (1, 1)",
    ),
    "from_conv_transpose": (
        lambda: CONV.from_conv(nn.ConvTranspose2d(1, 1, 1), E),
        TypeError,
        "a torch.nn.Conv2d, got",
    ),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_construction(name):
    make, error, words = BAD_CONSTRUCTION[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)


FEATURES = {"Linear": "I", "Conv2d": "C, H, W"}
kinds = pytest.mark.parametrize("name", FEATURES)


@kinds
@pytest.mark.parametrize("batch_first", [False, True], ids=["members_first", "batch_first"])
def test_wrong_number_of_members(name, batch_first):
    make, _, features = LAYERS[name]
    good, other = ((B, E), (E, B)) if batch_first else ((E, B), (B, E))
    layer = make(batch_first=batch_first)
    layer(torch.zeros(*good, *features))
    words = f"BatchEnsemble{name}: input should be .*{FEATURES[name]}. with E={E} .batch_first={batch_first}"
    with pytest.raises(ValueError, match=words):
        layer(torch.zeros(*other, *features))


@kinds
def test_tiled_inputs_divide(name):
    make, _, features = LAYERS[name]
    layer = make(tiled=True)
    words = rf"BatchEnsemble{name}: input should be \[E\*B, {FEATURES[name]}\] with E=3 \(tiled=True\), got float32\["
    own = [(E, B, *features)] * (name != "Linear")  # which takes any axes between rows and features
    for shape in ((E * B + 1, *features), *own, (1, *features), features):
        with pytest.raises(ValueError, match=words):
            layer(torch.zeros(shape))
    assert layer(torch.zeros(0, *features)).shape[0] == 0


@kinds
def test_wrong_rank_and_type(name):
    make, _, features = LAYERS[name]
    layer = make()
    for shape in ((), features, (1, E, B, *features)):
        with pytest.raises(
            ValueError, match=rf"BatchEnsemble{name}: input should be \[B, {FEATURES[name]}\] or \[E, B, "
        ):
            layer(torch.zeros(shape))
    with pytest.raises(TypeError, match=rf"BatchEnsemble{name}: input should be a torch.Tensor, got list"):
        layer([1.0])
    with pytest.raises(TypeError, match=r"should be torch\.float64 like x"):
        layer(torch.zeros(B, *features, dtype=torch.float64))


@kinds
def test_wrong_member(name):
    make, _, features = LAYERS[name]
    layer, x = make(), torch.zeros(B, *features)
    with pytest.raises(IndexError, match=rf"BatchEnsemble{name}: member should be in \[-3, 3\), got 3"):
        layer(x, member=E)
    with pytest.raises(TypeError, match=f"BatchEnsemble{name}: member should be None or an int, got True"):
        layer(x, member=True)
    with pytest.raises(ValueError, match=rf"input should be \[B, {FEATURES[name]}\] when member is given"):
        layer(torch.zeros(E, B, *features), member=0)
    with pytest.raises(TypeError, match=r"x should be a torch\.Tensor, got list"):
        layer([1.0], member=0)
