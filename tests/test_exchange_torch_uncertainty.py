"""Layers of torch-uncertainty compute the same here, and their states pass both ways with the same bits.

Each test runs with torch-uncertainty's own layers, where it is installed, and with their formulas.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from exchange_cases import TorchUncertainty, assert_same, assert_same_bits, torch_uncertainty_layers
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.exchange import torch_uncertainty as exchange

E, I, O = 4, 12, 8  # Masksembles needs 10 inputs or more
HOW = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
LAYERS = {
    "BatchLinear": (lambda lib, **o: lib.BatchLinear(I, O, E, **o), (I,)),
    "BatchLinear-nobias": (lambda lib, **o: lib.BatchLinear(I, O, E, bias=False, **o), (I,)),
    "BatchConv1d": (lambda lib, **o: lib.BatchConv1d(I, O, 3, E, **HOW, **o), (I, 9)),
    "BatchConv2d": (lambda lib, **o: lib.BatchConv2d(I, O, 3, E, **HOW, **o), (I, 9, 8)),
    "BatchConv2d-same": (lambda lib, **o: lib.BatchConv2d(I, O, (3, 2), E, padding="same", bias=False, **o), (I, 5, 6)),
    "BatchConvTranspose2d": (
        lambda lib, **o: lib.BatchConvTranspose2d(I, O, 3, E, output_padding=1, **HOW, **o),
        (I, 4, 5),
    ),
    "MaskedLinear": (lambda lib, **o: lib.MaskedLinear(I, O, E, 2.0, **o), (I,)),
    "MaskedLinear-nobias": (lambda lib, **o: lib.MaskedLinear(I, O, E, 2.0, bias=False, **o), (I,)),
    "MaskedConv2d": (lambda lib, **o: lib.MaskedConv2d(I, O, 3, E, 2.0, **HOW, **o), (I, 9, 8)),
    "MaskedConvTranspose2d": (lambda lib, **o: lib.MaskedConvTranspose2d(I, O, 3, E, 2.0, stride=2, **o), (I, 4, 5)),
}
WITH_COUNTERPART = [name for name in LAYERS if "Transpose" not in name and "1d" not in name]
PACKED = {
    "first": {"first": True},
    "inner": {},
    "last": {"last": True},
    "alone": {"first": True, "last": True},
    "nobias": {"bias": False},
    "last-nobias": {"last": True, "bias": False},
}
packed_layers = pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
double = {"dtype": torch.float64}


@pytest.fixture(params=["torch_uncertainty", "formulas"])
def lib(request):
    return torch_uncertainty_layers() if request.param == "torch_uncertainty" else TorchUncertainty


def layer_of(lib, name: str, **options) -> nn.Module:
    return LAYERS[name][0](lib, **options)


def rows(name: str, batch: int, **options) -> Tensor:
    return torch.randn(E * batch, *LAYERS[name][1], **options)


def packed(lib, **options) -> nn.Module:
    return lib.PackedLinear(I, O, alpha=2, num_estimators=E, **options)


def test_rows_are_tiled_member_by_member_and_r_scales_inputs(lib):
    layer = lib.BatchLinear(2, 3, num_estimators=2, **double)
    x = torch.randn(6, 2, **double)
    members = torch.tensor([0, 0, 0, 1, 1, 1])
    y = (x * layer.r_group[members]) @ layer.linear.weight.T * layer.s_group[members] + layer.bias[members]
    torch.testing.assert_close(layer(x), y)


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_accelerated_layer_computes_the_same(lib, name, dtype):
    theirs = layer_of(lib, name, dtype=dtype)
    ours = exchange.accelerate(copy.deepcopy(theirs))
    assert type(ours).__module__.startswith("effens_kernels.")
    for x in (rows(name, 5, dtype=dtype), rows(name, 1, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)):
        assert_same(ours, theirs, x, state_of=nn.Module.state_dict)
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    assert ours(rows(name, 0, dtype=dtype)).shape == (0, *ours(rows(name, 1, dtype=dtype)).shape[1:])


@pytest.mark.parametrize("name", WITH_COUNTERPART)
def test_layer_computes_the_same_and_its_state_passes_both_ways(lib, name):
    theirs = layer_of(lib, name)
    ours = exchange.from_layer(theirs)
    assert type(ours) is (ek.nn.BatchEnsembleConv2d if "Conv" in name else ek.nn.BatchEnsembleLinear)
    assert_same(ours, theirs, rows(name, 5), state_of=exchange.state_dict)
    assert_same_bits(exchange.state_dict(ours), theirs.state_dict())
    fresh = exchange.load_state_dict(exchange.from_layer(layer_of(lib, name)), theirs.state_dict())
    assert_same_bits(fresh.state_dict(), ours.state_dict())
    theirs_again = layer_of(lib, name)
    theirs_again.load_state_dict(exchange.state_dict(fresh))
    assert_same_bits(theirs_again.state_dict(), theirs.state_dict())


@packed_layers
def test_packed_layer_computes_the_same(lib, options):
    theirs = packed(lib, **options)
    ours = exchange.accelerate(copy.deepcopy(theirs))
    groups, outputs, inputs = theirs.weight.shape
    for shape in ((17, groups * inputs), (5, 3, groups * inputs)):
        assert_same(ours, theirs, torch.randn(shape), state_of=nn.Module.state_dict)
    empty = ours(torch.randn(0, groups * inputs))
    assert empty.shape == (0, groups * outputs // (E if options.get("last") else 1))
    assert_same_bits(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("implementation", ["conv1d", "full", "sparse"])
def test_packed_layer_of_another_implementation(lib, implementation):
    theirs = packed(lib, implementation=implementation)
    x = torch.randn(5, 2 * I)
    expected = theirs(x)
    torch.testing.assert_close(exchange.accelerate(theirs)(x), expected)
    if implementation == "sparse":
        with pytest.raises(ValueError, match="dense weights, got implementation='sparse'"):
            exchange.from_layer(theirs)
    else:
        assert_same_bits(exchange.state_dict(exchange.from_layer(theirs)), theirs.state_dict())


@pytest.mark.parametrize("last", [False, True])
def test_packed_layer_of_several_groups_per_member(lib, last):
    theirs = lib.PackedLinear(16, 16, alpha=2, num_estimators=2, gamma=2, last=last, **double)
    assert_same(exchange.accelerate(copy.deepcopy(theirs)), theirs, torch.randn(5, 32, **double))
    with pytest.raises(ValueError, match="gamma=1, got gamma=2"):
        exchange.from_layer(theirs)


@packed_layers
def test_packed_layer_as_a_layer_of_members(lib, options):
    first, last = options.get("first", False), options.get("last", False)
    theirs = packed(lib, **options)
    ours = exchange.from_layer(theirs)
    x = torch.randn(17, theirs.weight.shape[2] * theirs.groups)
    # Features of one member are one block there, an axis of their own here; a first layer gives all members one input.
    y = ours(x if first else x.unflatten(-1, (E, -1)))
    torch.testing.assert_close(y.transpose(0, 1).flatten(0, 1) if last else y.flatten(1), theirs(x))
    state = exchange.state_dict(ours, first=[""] if first else [])
    assert_same_bits(state, theirs.state_dict())
    fresh = exchange.from_layer(packed(lib, **options))
    assert_same_bits(
        exchange.load_state_dict(fresh, state, first=[""] if first else []).state_dict(), ours.state_dict()
    )


# ------------------------------------------------------------------------------------------- whole models


def model_of(lib) -> nn.Module:
    return nn.Sequential(
        lib.BatchConv2d(3, O, 3, E),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(1),
        lib.BatchLinear(4 * O, I, E),
        nn.SiLU(),
        lib.MaskedLinear(I, 16, E, 2.0),
        nn.Tanh(),
        nn.LayerNorm(16),
        lib.BatchLinear(16, 3, E),
    )


def test_accelerated_model_computes_the_same(lib):
    theirs = model_of(lib)
    ours = copy.deepcopy(theirs)
    identities = [id(p) for p in ours.parameters()]
    exchange.accelerate(ours)
    assert [id(p) for p in ours.parameters()] == identities
    assert [getattr(ours[n], "activation", None) for n in (0, 4, 6, 9)] == [None, "silu", "tanh", None]
    x = torch.randn(E * 5, 3, 9, 8)
    assert_same(ours, theirs, x, state_of=nn.Module.state_dict)
    expected = ours(x)
    if lib is TorchUncertainty:  # its copies of classes are not where pickle looks for them
        ours = nn.Sequential(*(ours[n] for n in (4, 5)))
        x = torch.randn(E * 5, 4 * O)
        expected = ours(x)
    for again in (copy.deepcopy(ours), exchange.accelerate(ours), torch.compile(ours, backend="aot_eager")):
        torch.testing.assert_close(again(x), expected)
    layer = ours[4] if len(ours) > 4 else ours[0]
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer)).r_group, layer.r_group)


def test_state_of_a_model_built_alike(lib):
    theirs = nn.Sequential(lib.BatchConv2d(3, O, 3, E), nn.Flatten(1), lib.BatchLinear(O * 6, I, E), nn.LayerNorm(I))
    ours = nn.Sequential(
        ek.nn.BatchEnsembleConv2d(3, O, 3, E, tiled=True),
        nn.Flatten(1),
        ek.nn.BatchEnsembleLinear(O * 6, I, E, tiled=True),
        nn.LayerNorm(I),
    )
    exchange.load_state_dict(ours, theirs.state_dict())
    assert_same(ours, theirs, torch.randn(E * 5, 3, 5, 4), state_of=exchange.state_dict)
    theirs.load_state_dict(exchange.state_dict(ours))


# ---------------------------------------------------------------------------------------------- bad input


def test_rows_that_members_cannot_share_are_refused(lib):
    layers = [layer_of(lib, "BatchLinear"), layer_of(lib, "MaskedLinear")]
    for layer in (*map(exchange.from_layer, layers), *map(exchange.accelerate, layers)):
        with pytest.raises(
            ValueError, match=r"input should be \[E\*B, I\] with E=4 \(tiled=True\), got float32\[10, 12\]"
        ):
            layer(torch.randn(10, I))


def test_layers_without_a_counterpart_are_refused(lib):
    for name in LAYERS.keys() - set(WITH_COUNTERPART):
        with pytest.raises(ValueError, match=rf"has a counterpart \(BatchLinear, .*\), got {name}$"):
            exchange.from_layer(layer_of(lib, name))
    with pytest.raises(ValueError, match=r"got Linear$"):
        exchange.from_layer(nn.Linear(I, O))
    with pytest.raises(ValueError, match=r"layers of torch_uncertainty \(BatchLinear, .*got Linear without any"):
        exchange.accelerate(nn.Linear(I, O))


def test_convolutions_of_packed_ensembles_are_named():
    theirs = torch_uncertainty_layers().PackedConv2d(8, 8, 3, alpha=2, num_estimators=2)
    with pytest.raises(ValueError, match="got PackedConv2d"):
        exchange.from_layer(theirs)
    with pytest.raises(ValueError, match="got of it only PackedConv2d"):
        exchange.accelerate(nn.Sequential(theirs))


def test_layers_that_are_neither_library_layer_are_refused():
    half = ek.nn.BatchEnsembleLinear(I, O, E, shared_bias=True)
    with pytest.raises(ValueError, match="a bias per member, got one bias at ''"):
        exchange.state_dict(half)
    half.r.requires_grad_(False)
    half.s.requires_grad_(False)
    with pytest.raises(ValueError, match="of an r of zeros and ones"):
        exchange.state_dict(half)
    with torch.no_grad():
        half.r.fill_(1.0)
    with pytest.raises(ValueError, match="of a s of ones"):
        exchange.state_dict(half)


def test_states_that_do_not_fit_are_refused():
    layer, good = ek.nn.BatchEnsembleLinear(I, O, E), TorchUncertainty.BatchLinear(I, O, E).state_dict()
    with pytest.raises(ValueError, match=r"state\['r_group'\] should be of shape \[4, 12\], got float32\[4, 8\]"):
        exchange.load_state_dict(layer, {**good, "r_group": good["s_group"]})
    with pytest.raises(ValueError, match=r"a tensor 'linear.weight', got none"):
        exchange.load_state_dict(layer, {"weight": good["linear.weight"]})
    with pytest.raises(TypeError, match="should be a state_dict, got NoneType"):
        exchange.load_state_dict(layer, None)
    model = nn.Sequential(ek.nn.EnsembleLinear(I, O, E), layer)
    with pytest.raises(ValueError, match=r"first should be paths of an EnsembleLinear \('0'\), got '1'"):
        exchange.state_dict(model, first=["0", "1"])
    with pytest.raises(TypeError, match="first should be paths of layers, got '0'"):
        exchange.load_state_dict(model, {}, first="0")
    for call in (exchange.accelerate, exchange.from_layer, exchange.state_dict):
        with pytest.raises(TypeError, match=r"should be a torch\.nn\.Module, got dict"):
            call({})


def test_input_of_a_packed_layer_is_checked():
    with pytest.raises(ValueError, match=r"PackedLinear: inputs should be \[\*, 24\], got float32\[5, 23\]"):
        exchange.accelerate(packed(TorchUncertainty))(torch.randn(5, 23))
