"""Mixture layers equal PyTorch's layers of mixed weights, in every layout, from banks of their own or shared ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effens_kernels.nn import MixtureConv2d, MixtureLinear, TemplateBank
from effens_kernels.ops._activations import ACTIVATIONS

E, K, B, I, O = 3, 4, 10, 7, 6
DOUBLE = {"dtype": torch.float64}
LAYOUTS = {"members_first": {}, "batch_first": {"batch_first": True}, "tiled": {"tiled": True}}
BIASES = {"own_bias": {}, "shared_bias": {"shared_bias": True}, "no_bias": {"bias": False}}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
biases = pytest.mark.parametrize("bias", BIASES)

LAYERS = {
    "Linear": (lambda **o: MixtureLinear(I, O, E, K, **o), (I,)),
    "Linear-gelu": (lambda **o: MixtureLinear(I, O, E, K, activation="gelu", **o), (I,)),
    "Conv2d": (lambda **o: MixtureConv2d(4, 6, 3, E, K, **o), (4, 8, 7)),
    "Conv2d-groups": (lambda **o: MixtureConv2d(4, 6, (3, 2), E, K, (2, 1), 1, 2, 2, **o), (4, 8, 7)),
    "Conv2d-same": (lambda **o: MixtureConv2d(4, 6, 3, E, K, padding="same", dilation=2, **o), (4, 8, 7)),
    "Conv2d-circular": (
        lambda **o: MixtureConv2d(4, 6, (3, 2), E, K, padding=(1, 2), padding_mode="circular", **o),
        (4, 8, 7),
    ),
}
layers = pytest.mark.parametrize("name", LAYERS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def stored(t: Tensor, layout: str) -> Tensor:
    """[E, B, ...] as the layer takes it and gives it."""
    return {"members_first": t, "batch_first": t.transpose(0, 1), "tiled": t.flatten(0, 1)}[layout]


def weight_of(layer: nn.Module, e: int) -> Tensor:
    """The paper's equation, template by template."""
    bank, terms = layer.bank.templates, zip(layer.coefficients[e], layer.templates_of(e))
    size = torch.Size(layer.shape).numel()
    if layer.bank.shape:
        return sum(a * bank[t] for a, t in terms)
    return sum(a * bank[t : t + size].view(layer.shape) for a, t in terms)


def member(layer: nn.Module, x: Tensor, e: int) -> Tensor:
    """What member e is, in PyTorch's layers."""
    bias = layer.bias if layer.bias is None or layer.bias.dim() == 1 else layer.bias[e]
    if isinstance(layer, MixtureLinear):
        return ACTIVATIONS[layer.activation].apply(F.linear(x, weight_of(layer, e), bias))
    how = layer.stride, layer.padding, layer.dilation, layer.groups, bias is not None, layer.padding_mode
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, *how, **DOUBLE)
    parameters = {"weight": weight_of(layer, e), **({} if bias is None else {"bias": bias})}
    return torch.func.functional_call(plain, parameters, x)


# ----------------------------------------------------------------------------------------------------------- values


@layers
@layouts
@biases
def test_a_loop_over_members(name, layout, bias):
    """Rows for each member, the same rows, and each member alone; forward and backward."""
    make, features = LAYERS[name]
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
    make, features = LAYERS[name]
    layer = make(**DOUBLE)
    layer(torch.randn(B, *features, **DOUBLE), member=1).square().sum().backward()
    for parameter in (layer.coefficients, layer.bias):
        assert parameter.grad[1].any()
        assert not parameter.grad[[0, 2]].any()
    assert layer.bank.templates.grad.any()


def test_tiled_rows_may_have_more_axes():
    layer = MixtureLinear(I, O, E, K, tiled=True, **DOUBLE)
    x = torch.randn(E * 2, 5, 3, I, **DOUBLE)
    y = layer(x)
    assert y.shape == (E * 2, 5, 3, O)
    close(y[2:4], member(layer, x[2:4], 1))


@biases
@layers
def test_fold(name, bias):
    layer = LAYERS[name][0](**BIASES[bias], **DOUBLE)
    weights, folded_biases = layer.fold()
    for e in range(E):
        weight, folded_bias = layer.fold(e)
        close(weights[e], weight_of(layer, e))
        close(weight, weight_of(layer, e))
        if bias == "no_bias":
            assert folded_biases is None
            assert folded_bias is None
        else:
            expected = layer.bias if bias == "shared_bias" else layer.bias[e]
            assert torch.equal(folded_biases[e], expected)
            assert torch.equal(folded_bias, expected)
    weights.sum().backward()
    sums = layer.coefficients.detach().sum(0)
    close(layer.bank.templates.grad, sums.view(K, *[1] * (weights.dim() - 1)).expand_as(layer.bank.templates))


# ------------------------------------------------------------------------------------------- which templates of a bank

ASSIGNED = {  # start, disjoint: the templates of each member, by hand
    "from the start": (0, False, [[0, 1, 2, 3]] * 3),
    "to the end": (3, False, [[3, 4, 5, 6]] * 3),
    "past the end": (5, False, [[5, 6, 0, 1]] * 3),
    "modulo": (12, False, [[5, 6, 0, 1]] * 3),
    "disjoint": (1, True, [[1, 2, 3, 4], [5, 6, 0, 1], [2, 3, 4, 5]]),
}


@pytest.mark.parametrize("case", ASSIGNED)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_templates_in_turn(case, kind):
    start, disjoint, expected = ASSIGNED[case]
    shape = (O, I) if kind == "Linear" else (6, 4, 3, 3)
    bank = TemplateBank(7, shape, **DOUBLE)
    make, features = LAYERS[kind]
    layer = make(bank=bank, start=start, disjoint=disjoint)
    assert [layer.templates_of(e) for e in range(E)] == expected
    check_values(layer, features)
    used = torch.zeros(7, dtype=torch.bool)
    used[torch.tensor(expected).flatten()] = True
    bank.templates.grad = None
    layer(torch.randn(B, *features, **DOUBLE)).square().sum().backward()
    assert torch.equal(bank.templates.grad.flatten(1).any(1), used)


def test_disjoint_members_where_there_are_enough():
    bank = TemplateBank(20, (O, I), **DOUBLE)
    layer = MixtureLinear(I, O, E, K, bank=bank, start=5, disjoint=True)
    assert [layer.templates_of(e) for e in range(E)] == [list(range(s, s + K)) for s in (5, 9, 13)]
    coefficients, templates = layer.mixing()
    assert coefficients.shape == (E, E * K)
    assert templates.data_ptr() == bank.templates[5].data_ptr()
    check_values(layer, (I,))


def test_a_run_without_a_wrap_is_a_view():
    bank = TemplateBank(7, (O, I))
    layer = MixtureLinear(I, O, E, K, bank=bank, start=2)
    coefficients, templates = layer.mixing()
    assert coefficients is layer.coefficients
    assert templates.shape == (K, O, I)
    assert templates.data_ptr() == bank.templates[2].data_ptr()
    whole = MixtureLinear(I, O, E, K, bank=TemplateBank(K, (O, I)))
    assert whole.mixing()[1] is whole.bank.templates


BLOB = {  # numbers in the blob, start, disjoint: where each member's templates begin
    "inside": (1000, 100, False, [[100, 142, 184, 226]] * 3),
    "moved back": (200, 100, False, [[32, 74, 116, 158]] * 3),
    "modulo": (1000, 2100, False, [[100, 142, 184, 226]] * 3),
    "disjoint": (1000, 10, True, [[10, 52, 94, 136], [178, 220, 262, 304], [346, 388, 430, 472]]),
    "disjoint, reused": (301, 10, True, [[7, 49, 91, 133], [175, 217, 259, 7], [49, 91, 133, 175]]),
}


@pytest.mark.parametrize("case", BLOB)
def test_a_flat_blob(case):
    numbers, start, disjoint, expected = BLOB[case]
    bank = TemplateBank(numbers, std=0.1, **DOUBLE)
    layer = MixtureLinear(I, O, E, K, bank=bank, start=start, disjoint=disjoint)
    assert [layer.templates_of(e) for e in range(E)] == expected
    check_values(layer, (I,))
    last = expected[-1][-1] if case != "disjoint, reused" else 301 - O * I
    assert layer.run.end == (last + O * I) % numbers


def test_layers_of_any_shape_share_a_blob():
    bank = TemplateBank(500, std=0.1, **DOUBLE)
    linear = MixtureLinear(I, O, E, K, bank=bank)
    conv = MixtureConv2d(4, 6, 3, E, 2, bank=bank, start=linear.run.end)
    assert conv.run.start == 500 - 2 * 216
    check_values(linear, (I,))
    check_values(conv, (4, 8, 7))


def check_values(layer: nn.Module, features: tuple[int, ...]) -> None:
    """Together, alone, and in backward."""
    x = torch.randn(B, *features, **DOUBLE)
    y, expected = layer(x), torch.stack([member(layer, x, e) for e in range(E)])
    close(y, expected)
    for e in range(E):
        close(layer(x, member=e), expected[e])
    grad, parameters = torch.randn_like(y), [layer.bank.templates, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((t * grad).sum(), parameters) for t in (y, expected))):
        close(a, b)


# ---------------------------------------------------------------------------------------------------------- beginning


@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "blob"])
def test_weights_begin_as_large_as_usual(kind, disjoint):
    """For every member and layer: coefficients have the length that makes it so, whatever their direction."""
    if kind == "blob":
        bank = TemplateBank(200_000, std=0.01)
        layer = MixtureLinear(200, 150, 4, 5, bank=bank, start=150_000, disjoint=disjoint)
        usual = (3 * 200) ** -0.5
    elif kind == "Linear":
        layer, usual = MixtureLinear(200, 150, 4, 5, disjoint=disjoint), (3 * 200) ** -0.5
    else:
        layer, usual = MixtureConv2d(20, 150, 3, 4, 5, disjoint=disjoint), (3 * 180) ** -0.5
    scale = layer.fold()[0].flatten(1).std(1) / usual
    torch.testing.assert_close(scale, torch.ones(4), rtol=0, atol=0.2 if kind == "blob" else 0.05)
    length = layer.coefficients.norm(dim=1) * layer.bank.std / layer.std
    torch.testing.assert_close(length, torch.ones(4))
    assert (layer.bias.abs() <= usual * 3**0.5).all()


def test_members_begin_in_all_directions():
    layer = MixtureLinear(3, 2, 4000, 3)
    assert layer.coefficients.mean(0).abs().max() < 0.1
    cosines = layer.coefficients[:2000] @ layer.coefficients[2000:].t()
    assert abs(cosines.square().mean().item() - 1 / 3) < 0.02


@layers
def test_reset_parameters_draws_again(name, seed):
    torch.manual_seed(seed)
    layer = LAYERS[name][0]()
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(value, first[key]) for key, value in layer.state_dict().items())
    bank = TemplateBank(K, (O, I))
    before = bank.templates.clone()
    MixtureLinear(I, O, E, K, bank=bank).reset_parameters()
    assert torch.equal(bank.templates, before)


@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_from_linear(bias, shared_bias):
    plain = nn.Linear(40, 30, bias, **DOUBLE).eval()
    layer = MixtureLinear.from_linear(plain, 4, 5, shared_bias=shared_bias, activation="relu", spread=0.3)
    weights, folded = layer.fold()
    close(weights.mean(0), plain.weight)
    assert torch.equal(layer.bank.templates[0], plain.weight)
    distance = (weights - plain.weight).square().mean().sqrt() / plain.weight.square().mean().sqrt()
    assert 0.1 < distance < 0.4
    assert not layer.training
    if bias:
        assert torch.equal(folded, plain.bias.expand(4, -1))
        assert layer.bias.data_ptr() != plain.bias.data_ptr()
    one = MixtureLinear.from_linear(plain, 4, 1)
    x = torch.randn(B, 40, **DOUBLE)
    close(one(x), plain(x).expand(4, -1, -1))
    close(MixtureLinear.from_linear(plain, 1, 3)(x)[0], plain(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_from_conv(memory_format):
    how = {"stride": (1, 2), "padding": (2, 1), "groups": 2, "padding_mode": "replicate", **DOUBLE}
    plain = nn.Conv2d(4, 6, (3, 2), **how).to(memory_format=memory_format)
    layer = MixtureConv2d.from_conv(plain, E, K)
    close(layer.fold()[0].mean(0), plain.weight)
    assert layer.bank.templates[0].stride() == plain.weight.stride()
    assert layer.fold()[0][1].stride() == plain.weight.stride()
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(layer, name) == getattr(plain, name)
    x = torch.randn(B, 4, 8, 7, **DOUBLE)
    close(MixtureConv2d.from_conv(plain, E, 1)(x), plain(x).expand(E, -1, -1, -1, -1))


def test_from_layers_on_meta_and_of_zeros():
    layer = MixtureLinear.from_linear(nn.Linear(I, O, device="meta"), E, K)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    plain = nn.Linear(I, O)
    nn.init.zeros_(plain.weight)
    assert MixtureLinear.from_linear(plain, E, K).fold()[0].std() > 0


# --------------------------------------------------------------------------------------------------- as nn.Modules


class TwoLayers(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.bank = TemplateBank(5, (I, I), **options)
        self.layers = nn.ModuleList(
            MixtureLinear(I, I, E, 3, bank=self.bank, start=start, activation="tanh") for start in (0, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_a_shared_bank_is_listed_once():
    model = TwoLayers()
    names = ["bank.templates"] + [f"layers.{n}.{p}" for n in range(2) for p in ("coefficients", "bias")]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == names
    assert list(dict(model.layers[0].named_parameters())) == ["coefficients", "bias"]
    assert not list(model.layers[0].children())


def test_state_dict_keys_of_a_bank_of_its_own():
    assert list(MixtureLinear(I, O, E, K).state_dict()) == ["coefficients", "bias", "bank.templates"]
    assert list(MixtureConv2d(4, 6, 3, E, K, bias=False).state_dict()) == ["coefficients", "bank.templates"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_of_a_shared_bank(how, tmp_path):
    original = TwoLayers()
    x = torch.randn(B, I)
    expected = original(x)
    if how == "deepcopy":
        other = copy.deepcopy(original)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    elif how == "torch.save":
        torch.save(original, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        other = TwoLayers()
        other.load_state_dict(original.state_dict())
    assert torch.equal(other(x), expected)
    assert all(layer.bank is other.bank for layer in other.layers)
    assert other.bank is not original.bank
    with torch.no_grad():
        other.bank.templates.zero_()
    assert torch.equal(original(x), expected)
    assert not torch.equal(other(x), expected)


def test_a_layer_alone_takes_its_bank_along():
    model = TwoLayers()
    layer = copy.deepcopy(model.layers[0])
    assert layer.bank is not model.bank
    assert torch.equal(layer.bank.templates, model.bank.templates)


def test_moves_and_conversions():
    model = TwoLayers()
    x = torch.randn(B, I)
    expected = model.double()(x.double())
    assert expected.dtype == torch.float64
    assert model.layers[0].bank.templates.dtype == torch.float64
    meta = model.to("meta")
    assert meta.layers[1].bank.templates.is_meta
    assert meta(x.double().to("meta")).shape == (E, B, I)
    on_meta = TwoLayers(device="meta")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    on_meta.to_empty(device="cpu")
    assert on_meta.layers[0].bank is on_meta.bank
    assert not on_meta.layers[0].mixing()[1].is_meta


def test_channels_last():
    layer = MixtureConv2d(4, 6, 3, E, K)
    x = torch.randn(B, 4, 8, 7)
    expected = layer(x)
    layer(x).sum().backward()
    layer.to(memory_format=torch.channels_last)
    assert layer.bank.templates.shape == (K, 6, 4, 3, 3)
    for t in (layer.bank.templates, layer.bank.templates.grad):
        assert all(template.is_contiguous(memory_format=torch.channels_last) for template in t)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_functional_call_reaches_a_shared_bank():
    model, other = TwoLayers(), TwoLayers()
    x = torch.randn(B, I)
    assert torch.equal(torch.func.functional_call(model, dict(other.named_parameters()), (x,)), other(x))


REPRS = {
    "MixtureLinear(in_features=7, out_features=6, num_members=3, num_templates=4, bias=True, start=3, disjoint=True, "
    "shared_bias=True, activation='relu', tiled=True)": lambda bank: MixtureLinear(
        I, O, E, K, bank=bank, start=3, disjoint=True, shared_bias=True, activation="relu", tiled=True
    ),
    "MixtureLinear(\n  in_features=7, out_features=6, num_members=3, num_templates=4, bias=False, batch_first=True\n"
    "  (bank): TemplateBank(num_templates=4, shape=(6, 7))\n)": lambda bank: MixtureLinear(
        I, O, E, K, bias=False, batch_first=True
    ),
    "MixtureConv2d(\n  in_channels=4, out_channels=6, kernel_size=(3, 3), num_members=3, num_templates=4, "
    "stride=(1, 1), padding='same', bias=True\n"
    "  (bank): TemplateBank(num_templates=4, shape=(6, 4, 3, 3))\n)": lambda bank: MixtureConv2d(
        4, 6, 3, E, K, padding="same"
    ),
}


@pytest.mark.parametrize("text", REPRS)
def test_repr(text):
    assert repr(REPRS[text](TemplateBank(5, (O, I)))) == text


@pytest.mark.parametrize("how", ["own bank", "past the end", "disjoint"])
def test_compiled(how):
    if how == "own bank":
        model, features = MixtureConv2d(4, 6, 3, E, K), (4, 8, 7)
    else:
        bank = TemplateBank(7, (O, I))
        layer = MixtureLinear(I, O, E, K, bank=bank, start=5, disjoint=how == "disjoint")
        model, features = nn.Sequential(layer), (I,)
    x = torch.randn(B, *features)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- bad input

LINEAR, CONV = MixtureLinear, MixtureConv2d
BAD = {
    "members": (lambda: LINEAR(I, O, 0, K), ValueError, "MixtureLinear: num_members should be at least 1, got 0"),
    "templates": (lambda: LINEAR(I, O, E, 0), ValueError, "MixtureLinear: num_templates should be at least 1, got 0"),
    "templates_float": (lambda: LINEAR(I, O, E, 2.0), TypeError, "num_templates should be an int, got 2.0"),
    "features": (lambda: LINEAR(0, O, E, K), ValueError, "in_features should be at least 1"),
    "activation": (lambda: LINEAR(I, O, E, K, activation="elu"), ValueError, "activation should be one of"),
    "layouts": (lambda: LINEAR(I, O, E, K, batch_first=True, tiled=True), ValueError, "tiled should be False"),
    "std": (lambda: LINEAR(I, O, E, K, std=0), ValueError, "std should be positive and finite, got 0"),
    "std_type": (lambda: LINEAR(I, O, E, K, std="1"), TypeError, "std should be a number, got '1'"),
    "start": (lambda: LINEAR(I, O, E, K, start=1), ValueError, "start should be 0 without a bank, got 1"),
    "start_type": (
        lambda: LINEAR(I, O, E, K, bank=TemplateBank(K, (O, I)), start=0.5),
        TypeError,
        "start should be an int, got 0.5",
    ),
    "bank": (lambda: LINEAR(I, O, E, K, bank=nn.Linear(I, O)), TypeError, "bank should be None or a TemplateBank, got"),
    "bank_shape": (
        lambda: LINEAR(I, O, E, K, bank=TemplateBank(K, (I, O))),
        ValueError,
        "MixtureLinear: bank should be of templates [6, 7], or a flat blob, got templates [7, 6]",
    ),
    "bank_size": (
        lambda: LINEAR(I, O, E, K, bank=TemplateBank(3, (O, I))),
        ValueError,
        "MixtureLinear: num_templates should be at most the bank's 3, got 4",
    ),
    "blob_size": (
        lambda: LINEAR(I, O, E, K, bank=TemplateBank(100, std=1)),
        ValueError,
        "num_templates should be at most the bank's 2 of 42 numbers in a blob of 100, got 4",
    ),
    "groups": (
        lambda: CONV(5, 6, 3, E, K, groups=2),
        ValueError,
        "in_channels should be a multiple of groups=2, got 5",
    ),
    "groups_out": (lambda: CONV(4, 5, 3, E, K, groups=2), ValueError, "out_channels should be a multiple of groups=2"),
    "padding": (lambda: CONV(4, 6, 3, E, K, 2, "same"), ValueError, "numbers or 'valid' with stride (2, 2)"),
    "from_linear": (
        lambda: LINEAR.from_linear(nn.Conv2d(1, 1, 1), E, K),
        TypeError,
        "MixtureLinear.from_linear: linear should be a torch.nn.Linear, got Conv2d",
    ),
    "from_linear_bank": (
        lambda: LINEAR.from_linear(nn.Linear(I, O), E, K, bank=TemplateBank(K, (O, I))),
        TypeError,
        "MixtureLinear.from_linear: bank should be left out",
    ),
    "from_conv": (lambda: CONV.from_conv(nn.Linear(I, O), E, K), TypeError, "conv should be a torch.nn.Conv2d, got"),
    "spread": (lambda: LINEAR.from_linear(nn.Linear(I, O), E, K, spread="1"), TypeError, "spread should be a number"),
    "bank_empty": (lambda: TemplateBank(0, (O, I)), ValueError, "TemplateBank: num_templates should be at least 1"),
    "bank_shape_zero": (lambda: TemplateBank(1, (O, 0)), ValueError, "TemplateBank: shape should be at least 1, got 0"),
    "bank_shape_one": (lambda: TemplateBank(1, (O,)), ValueError, "shape should be () or the two or more sizes"),
    "blob_std": (lambda: TemplateBank(100), ValueError, "TemplateBank: std should be given for a flat blob, got None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_construction(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)


def test_bad_calls():
    layer = MixtureLinear(I, O, E, K)
    with pytest.raises(ValueError, match=r"MixtureLinear: input should be \[E, B, I\] with E=3 .batch_first=False"):
        layer(torch.zeros(B, E, I))
    with pytest.raises(ValueError, match=r"MixtureLinear: input should be \[B, I\] when member is given"):
        layer(torch.zeros(E, B, I), member=0)
    with pytest.raises(IndexError, match=r"MixtureLinear: member should be in \[-3, 3\), got 3"):
        layer(torch.zeros(B, I), member=E)
    with pytest.raises(TypeError, match=r"input should be a torch.Tensor, got list"):
        layer([1.0])
    tiled = MixtureLinear(I, O, E, K, tiled=True)
    for shape in ((E * B + 1, I), (E * B + 1, 2, I)):
        with pytest.raises(ValueError, match=r"input should be \[E\*B, I\] with E=3 \(tiled=True\), got float32\["):
            tiled(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"MixtureConv2d: input should be \[B, C, H, W\] or \[E, B, C, H, W\]"):
        MixtureConv2d(4, 6, 3, E, K)(torch.zeros(4, 8))
