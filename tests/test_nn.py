"""The layers equal torch.nn's, member by member: initialization, values, gradients, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from common import leaves
from torch import Tensor

from effens_kernels.nn import EnsembleLinear, EnsembleMLP, MultiHeadLinear
from effens_kernels.ops._activations import ACTIVATIONS

E, B, I, O, H = 3, 11, 7, 4, 5
layouts = pytest.mark.parametrize("batch_first", [False, True], ids=["members_first", "batch_first"])
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
DOUBLE = {"dtype": torch.float64}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def inputs_for(batch_first: bool) -> tuple[Tensor, Tensor]:
    """(rows per member as the layer takes them, the same as [E, B, I])."""
    x = torch.randn(E, B, I, dtype=torch.float64)
    return (x.transpose(0, 1).contiguous() if batch_first else x), x


def as_stored(y: Tensor, batch_first: bool) -> Tensor:
    return y.transpose(0, 1) if batch_first else y


# -------------------------------------------------------------------------------------------------- initialization


@biases
def test_initialized_as_linear_layers_in_a_row(bias, seed):
    torch.manual_seed(seed)
    layer = EnsembleLinear(I, O, E, bias)
    torch.manual_seed(seed)
    members = [torch.nn.Linear(I, O, bias) for _ in range(E)]
    assert torch.equal(layer.weight, torch.stack([m.weight for m in members]))
    assert (layer.bias is None) if not bias else torch.equal(layer.bias, torch.stack([m.bias for m in members]))


@biases
@pytest.mark.parametrize("members", [None, E])
def test_heads_initialized_as_linear_layers_in_a_row(bias, members, seed):
    torch.manual_seed(seed)
    layer = MultiHeadLinear(I, O, H, members, bias)
    torch.manual_seed(seed)
    heads = [torch.nn.Linear(I, O, bias) for _ in range(H * (members or 1))]
    assert torch.equal(layer.weight, torch.stack([h.weight for h in heads]).view(layer.weight.shape))
    if bias:
        assert torch.equal(layer.bias, torch.stack([h.bias for h in heads]).view(layer.bias.shape))


def test_mlp_initialized_layer_by_layer(seed):
    torch.manual_seed(seed)
    mlp = EnsembleMLP(I, [8, 9], O, E)
    torch.manual_seed(seed)
    layers = [EnsembleLinear(i, o, E) for i, o in ((I, 8), (8, 9), (9, O))]
    for ours, expected in zip(mlp.layers, layers):
        assert torch.equal(ours.weight, expected.weight)
        assert torch.equal(ours.bias, expected.bias)


@pytest.mark.parametrize(
    "make",
    [lambda: EnsembleLinear(I, O, E), lambda: MultiHeadLinear(I, O, H, E), lambda: EnsembleMLP(I, [6], O, E)],
    ids=["EnsembleLinear", "MultiHeadLinear", "EnsembleMLP"],
)
def test_reset_parameters_draws_again(make, seed):
    torch.manual_seed(seed)
    layer = make()
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(value, first[name]) for name, value in layer.state_dict().items())
    torch.manual_seed(seed)
    layer.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in layer.state_dict().items())
    assert all(p.requires_grad for p in layer.parameters())


# ----------------------------------------------------------------------------------------------------------- values


@layouts
@biases
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ensemble_linear_is_a_loop_over_members(batch_first, bias, activation):
    layer = EnsembleLinear(I, O, E, bias, activation=activation, batch_first=batch_first, **DOUBLE)
    act = ACTIVATIONS[activation].apply

    def member(x: Tensor, e: int) -> Tensor:
        return act(F.linear(x, layer.weight[e], layer.bias[e] if bias else None))

    given, x = inputs_for(batch_first)
    close(layer(given), as_stored(torch.stack([member(x[e], e) for e in range(E)]), batch_first))
    close(layer(x[0]), as_stored(torch.stack([member(x[0], e) for e in range(E)]), batch_first))
    for e in range(-E, E):
        close(layer(x[0], member=e), member(x[0], e))


@layouts
@biases
def test_multi_head_linear_is_a_loop_over_members_and_heads(batch_first, bias):
    layer = MultiHeadLinear(I, O, H, E, bias, batch_first=batch_first, **DOUBLE)

    def member(x: Tensor, e: int) -> Tensor:
        heads = [F.linear(x, layer.weight[e, h], layer.bias[e, h] if bias else None) for h in range(H)]
        return torch.stack(heads, 1)

    given, x = inputs_for(batch_first)
    close(layer(given), as_stored(torch.stack([member(x[e], e) for e in range(E)]), batch_first))
    close(layer(x[0]), as_stored(torch.stack([member(x[0], e) for e in range(E)]), batch_first))
    for e in range(-E, E):
        close(layer(x[0], member=e), member(x[0], e))


@biases
def test_heads_on_one_trunk(bias):
    layer = MultiHeadLinear(I, O, H, bias=bias, **DOUBLE)
    x = torch.randn(B, I, dtype=torch.float64)
    heads = [F.linear(x, layer.weight[h], layer.bias[h] if bias else None) for h in range(H)]
    close(layer(x), torch.stack(heads, 1))


@layouts
@pytest.mark.parametrize("hidden", [[], [6], [6, 9]], ids=["no_hidden", "1_hidden", "2_hidden"])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_mlp_is_a_loop_over_members(batch_first, hidden, activation):
    mlp = EnsembleMLP(I, hidden, O, E, activation=activation, batch_first=batch_first, **DOUBLE)
    act = ACTIVATIONS[activation].apply

    def member(x: Tensor, e: int) -> Tensor:
        for n, layer in enumerate(mlp.layers):
            x = F.linear(x, layer.weight[e], layer.bias[e])
            x = act(x) if n < len(hidden) else x
        return x

    given, x = inputs_for(batch_first)
    close(mlp(given), as_stored(torch.stack([member(x[e], e) for e in range(E)]), batch_first))
    close(mlp(x[0]), as_stored(torch.stack([member(x[0], e) for e in range(E)]), batch_first))
    close(mlp(x[0], member=1), member(x[0], 1))
    close(mlp(x[0], member=-1), member(x[0], E - 1))


@layouts
def test_batch_first_costs_no_copy_of_the_output(batch_first):
    y = EnsembleLinear(I, O, E, batch_first=batch_first)(torch.randn(B, I))
    assert y.shape == ((B, E, O) if batch_first else (E, B, O))
    assert (y.transpose(0, 1) if batch_first else y).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_and_to(dtype):
    layer = EnsembleMLP(I, [6], O, E, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(B, I, dtype=dtype)).dtype == dtype
    assert layer.to(torch.float32)(torch.randn(B, I)).dtype == torch.float32


def test_device_argument():
    for layer in (EnsembleLinear(I, O, E, device="meta"), MultiHeadLinear(I, O, H, device="meta")):
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        real = layer.to_empty(device="cpu")
        real.reset_parameters()
        assert real(torch.randn(B, I)).isfinite().all()


# --------------------------------------------------------------------------------------------------------- gradients


@layouts
def test_gradients_of_members_do_not_mix(batch_first):
    """The gradient of one member's loss reaches that member's parameters alone, and equals torch.nn.Linear's."""
    layer = EnsembleLinear(I, O, E, activation="gelu", batch_first=batch_first, **DOUBLE)
    given, x = inputs_for(batch_first)
    given.requires_grad_()
    y = layer(given)
    (y[:, 1] if batch_first else y[1]).pow(2).sum().backward()
    single = leaves((x[1], layer.weight[1], layer.bias[1]))
    F.gelu(F.linear(*single)).pow(2).sum().backward()
    close(layer.weight.grad[1], single[1].grad)
    close(layer.bias.grad[1], single[2].grad)
    close((given.grad[:, 1] if batch_first else given.grad[1]), single[0].grad)
    for e in (0, 2):
        assert not layer.weight.grad[e].any()
        assert not layer.bias.grad[e].any()


def test_gradient_through_one_member():
    layer = EnsembleMLP(I, [6], O, E, **DOUBLE)
    layer(torch.randn(B, I, dtype=torch.float64), member=2).sum().backward()
    assert all(not p.grad[:2].any() for p in layer.parameters())
    assert all(p.grad[2].any() for p in layer.parameters())


def test_frozen_parameters_get_no_gradient():
    layer = EnsembleLinear(I, O, E)
    layer.weight.requires_grad_(False)
    layer(torch.randn(B, I)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((E, O), float(B)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_equals_training_the_members_one_by_one(optimizer, seed):
    torch.manual_seed(seed)
    ensemble = EnsembleMLP(I, [16, 8], O, E, activation="tanh", **DOUBLE)
    singles = []
    for e in range(E):
        first, second, last = (torch.nn.Linear(i, o, **DOUBLE) for i, o in ((I, 16), (16, 8), (8, O)))
        for mine, layer in zip((first, second, last), ensemble.layers):
            mine.load_state_dict({name: value[e] for name, value in layer.state_dict().items()})
        singles.append(torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Tanh(), last))
    optimizers = [optimizer(m.parameters(), lr=0.05) for m in (ensemble, *singles)]
    for _ in range(5):
        x, target = torch.randn(E, B, I, dtype=torch.float64), torch.randn(B, O, dtype=torch.float64)
        for o in optimizers:
            o.zero_grad()
        (ensemble(x) - target).square().mean((1, 2)).sum().backward()
        for e, single in enumerate(singles):
            (single(x[e]) - target).square().mean().backward()
        for o in optimizers:
            o.step()
    for e, single in enumerate(singles):
        for n, layer in enumerate(ensemble.layers):
            # Adam divides by the root of a gradient's square: rounding of tiny gradients grows.
            torch.testing.assert_close(layer.weight[e], single[2 * n].weight, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(layer.bias[e], single[2 * n].bias, rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------------------------------- as nn.Modules


def test_state_dict_keys():
    assert list(EnsembleLinear(I, O, E).state_dict()) == ["weight", "bias"]
    assert list(EnsembleLinear(I, O, E, bias=False).state_dict()) == ["weight"]
    assert list(MultiHeadLinear(I, O, H).state_dict()) == ["weight", "bias"]
    keys = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert list(EnsembleMLP(I, [6], O, E).state_dict()) == keys
    assert list(EnsembleMLP(I, [6], O, E, bias=False).state_dict()) == keys[::2]


LAYERS = {
    "EnsembleLinear(in_features=7, out_features=4, num_members=3, bias=True)": lambda: EnsembleLinear(I, O, E),
    "EnsembleLinear(in_features=7, out_features=4, num_members=3, bias=False, activation='relu', batch_first=True)": (
        lambda: EnsembleLinear(I, O, E, False, activation="relu", batch_first=True)
    ),
    "MultiHeadLinear(in_features=7, out_features=4, num_heads=5, bias=True)": lambda: MultiHeadLinear(I, O, H),
    "MultiHeadLinear(in_features=7, out_features=4, num_heads=5, num_members=3, bias=True, batch_first=True)": (
        lambda: MultiHeadLinear(I, O, H, E, batch_first=True)
    ),
}


@pytest.mark.parametrize("text", LAYERS)
def test_repr(text):
    assert repr(LAYERS[text]()) == text


def test_repr_of_mlp_names_its_activation_in_hidden_layers_alone():
    text = repr(EnsembleMLP(I, [6], O, E, activation="silu", batch_first=True))
    assert text.startswith("EnsembleMLP(\n  num_members=3, batch_first=True\n")
    assert text.count("activation='silu'") == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("layer", ["EnsembleLinear", "MultiHeadLinear", "EnsembleMLP"])
def test_copies(layer, how, tmp_path):
    makers = {
        "EnsembleLinear": lambda: EnsembleLinear(I, O, E, activation="tanh"),
        "MultiHeadLinear": lambda: MultiHeadLinear(I, O, H, E),
        "EnsembleMLP": lambda: EnsembleMLP(I, [6], O, E, activation="gelu"),
    }
    original = makers[layer]()
    x = torch.randn(B, I)
    expected = original(x)
    if how == "deepcopy":
        other = copy.deepcopy(original)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    else:
        torch.save(original.state_dict(), tmp_path / "state.pt")
        other = makers[layer]()
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x), expected)
