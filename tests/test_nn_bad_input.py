"""Layers refuse what they cannot take, when they are made and when they are called."""

from __future__ import annotations

import pytest
import torch

from effens_kernels.nn import EnsembleLinear, EnsembleMLP, MultiHeadLinear

E, B, I, O, H = 3, 11, 7, 4, 5

BAD_CONSTRUCTION = {
    "linear_in_0": (lambda: EnsembleLinear(0, O, E), ValueError, "EnsembleLinear: in_features should be at least 1"),
    "linear_out_0": (lambda: EnsembleLinear(I, 0, E), ValueError, "EnsembleLinear: out_features should be at least 1"),
    "linear_members_0": (lambda: EnsembleLinear(I, O, 0), ValueError, "EnsembleLinear: num_members should be at lea"),
    "linear_members_negative": (lambda: EnsembleLinear(I, O, -2), ValueError, "at least 1, got -2"),
    "linear_in_float": (lambda: EnsembleLinear(7.0, O, E), TypeError, "in_features should be an int, got 7.0"),
    "linear_members_bool": (lambda: EnsembleLinear(I, O, True), TypeError, "num_members should be an int, got True"),
    "linear_members_none": (lambda: EnsembleLinear(I, O, None), TypeError, "num_members should be an int, got None"),
    "linear_activation": (lambda: EnsembleLinear(I, O, E, activation="elu"), ValueError, "EnsembleLinear: activation"),
    "heads_0": (lambda: MultiHeadLinear(I, O, 0), ValueError, "MultiHeadLinear: num_heads should be at least 1"),
    "heads_members_0": (lambda: MultiHeadLinear(I, O, H, 0), ValueError, "MultiHeadLinear: num_members should be at"),
    "heads_float": (lambda: MultiHeadLinear(I, O, 2.0), TypeError, "MultiHeadLinear: num_heads should be an int"),
    "mlp_members_0": (lambda: EnsembleMLP(I, [6], O, 0), ValueError, "EnsembleMLP: num_members should be at least 1"),
    "mlp_hidden_0": (lambda: EnsembleMLP(I, [0], O, E), ValueError, "at least 1, got 0"),
    "mlp_hidden_float": (lambda: EnsembleMLP(I, [6.0], O, E), TypeError, "should be an int, got 6.0"),
    "mlp_activation": (lambda: EnsembleMLP(I, [6], O, E, activation="elu"), ValueError, "EnsembleMLP: activation sho"),
    "mlp_out_activation": (
        lambda: EnsembleMLP(I, [6], O, E, out_activation="elu"),
        ValueError,
        "out_activation should",
    ),
    "mlp_out_activation_list": (
        lambda: EnsembleMLP(I, [6], O, E, out_activation=["relu"]),
        ValueError,
        "out_activation",
    ),
    "mlp_shared_3": (lambda: EnsembleMLP(I, [6], O, E, shared_layers=3), ValueError, "shared_layers should be 0 to 2"),
    "mlp_shared_negative": (lambda: EnsembleMLP(I, [6], O, E, shared_layers=-1), ValueError, "0 to 2 layers, got -1"),
    "mlp_shared_bool": (
        lambda: EnsembleMLP(I, [6], O, E, shared_layers=True),
        TypeError,
        "shared_layers should be an int",
    ),
    "mlp_shared_float": (lambda: EnsembleMLP(I, [6], O, E, shared_layers=1.0), TypeError, "should be an int, got 1.0"),
    "mlp_shared_none": (lambda: EnsembleMLP(I, [6], O, E, shared_layers=None), TypeError, "should be an int, got None"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_construction(name):
    make, error, words = BAD_CONSTRUCTION[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)


LAYERS = {
    "EnsembleLinear": lambda **o: EnsembleLinear(I, O, E, **o),
    "MultiHeadLinear": lambda **o: MultiHeadLinear(I, O, H, E, **o),
    "EnsembleMLP": lambda **o: EnsembleMLP(I, [6], O, E, **o),
}
layers = pytest.mark.parametrize("layer", LAYERS)


@layers
@pytest.mark.parametrize("batch_first", [False, True], ids=["members_first", "batch_first"])
def test_wrong_number_of_members(layer, batch_first):
    """Where B = E cannot save it: the other layout's input is refused, and the message names the layout."""
    good, other = ((B, E, I), (E, B, I)) if batch_first else ((E, B, I), (B, E, I))
    module = LAYERS[layer](batch_first=batch_first)
    module(torch.zeros(good))
    with pytest.raises(ValueError, match=f"{layer}: input should be .*E={E}.*batch_first={batch_first}") as raised:
        module(torch.zeros(other))
    assert str(list(other)) in str(raised.value)


@layers
@pytest.mark.parametrize("shape", [(), (I,), (1, E, B, I)], ids=str)
def test_wrong_rank(layer, shape):
    with pytest.raises(ValueError, match=rf"{layer}: input should be \[B, I\] or \[E, B, I\], got float32"):
        LAYERS[layer]()(torch.zeros(shape))


@layers
def test_no_tensor(layer):
    with pytest.raises(TypeError, match=rf"{layer}: input should be a torch.Tensor, got list"):
        LAYERS[layer]()([[1.0] * I])


@layers
def test_wrong_features_and_dtype(layer):
    module = LAYERS[layer]()
    with pytest.raises(ValueError, match=r"x should be .*I=7"):
        module(torch.zeros(B, I + 1))
    with pytest.raises(TypeError, match=r"should be torch\.float64 like x"):
        module(torch.zeros(B, I, dtype=torch.float64))
    with pytest.raises(TypeError, match="float32, float16, bfloat16 or float64"):
        module(torch.zeros(B, I, dtype=torch.int64))


@layers
@pytest.mark.parametrize("member", [E, -E - 1, 100])
def test_member_out_of_range(layer, member):
    with pytest.raises(IndexError, match=rf"{layer}: member should be in \[-3, 3\), got {member}"):
        LAYERS[layer]()(torch.zeros(B, I), member=member)


@layers
@pytest.mark.parametrize("member", [1.0, "0", True, torch.tensor(1)], ids=str)
def test_member_is_an_int(layer, member):
    with pytest.raises(TypeError, match=f"{layer}: member should be None or an int"):
        LAYERS[layer]()(torch.zeros(B, I), member=member)


@layers
@pytest.mark.parametrize("shape", [(E, B, I), (I,)], ids=str)
def test_member_takes_its_own_rows_alone(layer, shape):
    with pytest.raises(ValueError, match=rf"{layer}: input should be \[B, I\] when member is given, got float32"):
        LAYERS[layer]()(torch.zeros(shape), member=0)


@layers
def test_member_with_no_tensor(layer):
    with pytest.raises(TypeError, match=r"should be a torch\.Tensor, got list"):
        LAYERS[layer]()([[1.0] * I], member=0)


def test_heads_without_members():
    layer = MultiHeadLinear(I, O, H)
    with pytest.raises(ValueError, match="MultiHeadLinear: member should be None for a layer without members, got 0"):
        layer(torch.zeros(B, I), member=0)
    with pytest.raises(ValueError, match="multihead_linear: x should be"):
        layer(torch.zeros(E, B, I))
