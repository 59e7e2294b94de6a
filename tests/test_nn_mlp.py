"""EnsembleMLP with shared layers and an activation after the last: a loop over members, and an ordinary module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from effens_kernels.nn import EnsembleLinear, EnsembleMLP
from effens_kernels.ops._activations import ACTIVATIONS

E, B, I, O = 3, 11, 7, 4
HIDDEN = [6, 9]
DOUBLE = {"dtype": torch.float64}
layouts = pytest.mark.parametrize("batch_first", [False, True], ids=["members_first", "batch_first"])
shared = pytest.mark.parametrize("shared_layers", range(len(HIDDEN) + 2))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def heads_of(mlp: EnsembleMLP, x: Tensor, e: int) -> Tensor:
    """What member e is where its last layer has heads: [B, H, O]."""
    *hidden, last = mlp.layers
    for layer in hidden:
        own = min(e, layer.weight.shape[0] - 1)
        x = F.linear(x, layer.weight[own], None if layer.bias is None else layer.bias[own])
        x = ACTIVATIONS[mlp.activation].apply(x)
    own = min(e, last.weight.shape[0] - 1)
    biases = [None] * mlp.num_heads if last.bias is None else last.bias[own]
    y = torch.stack([F.linear(x, weight, bias) for weight, bias in zip(last.weight[own], biases)], 1)
    return ACTIVATIONS[mlp.out_activation].apply(y)


@layouts
@shared
@pytest.mark.parametrize("out_activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("hooked", [False, True], ids=["one_op", "hooked"])
def test_heads(batch_first, shared_layers, out_activation, bias, hooked):
    options = {"out_activation": out_activation, "shared_layers": shared_layers, "batch_first": batch_first}
    mlp = EnsembleMLP(I, HIDDEN, O, E, num_heads=5, activation="tanh", bias=bias, **options, **DOUBLE)
    if hooked:
        mlp.layers[0].register_forward_hook(lambda *_: None)
    x = torch.randn(E, B, I, **DOUBLE)
    own = torch.stack([heads_of(mlp, x[e], e) for e in range(E)])
    same = torch.stack([heads_of(mlp, x[0], e) for e in range(E)])
    for actual, expected in zip((mlp(x.transpose(0, 1) if batch_first else x), mlp(x[0])), (own, same)):
        y = actual.transpose(0, 1) if batch_first else actual
        close(y, expected)
        weight = torch.randn_like(expected)
        grads = (torch.autograd.grad((t * weight).sum(), list(mlp.parameters())) for t in (y, expected))
        for a, b in zip(*grads):
            close(a, b)
    close(mlp(x[0], member=2), heads_of(mlp, x[0], 2))


def member(mlp: EnsembleMLP, x: Tensor, e: int) -> Tensor:
    """What member e is, in PyTorch's operations."""
    last = len(mlp.layers) - 1
    for n, layer in enumerate(mlp.layers):
        own = min(e, layer.weight.shape[0] - 1)
        x = F.linear(x, layer.weight[own], None if layer.bias is None else layer.bias[own])
        x = ACTIVATIONS[mlp.out_activation if n == last else mlp.activation].apply(x)
    return x


@layouts
@shared
@pytest.mark.parametrize("out_activation", [None, "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_a_loop_over_members(batch_first, shared_layers, out_activation, bias):
    """Rows for each member, the same rows, and each member alone; forward and backward."""
    options = {"out_activation": out_activation, "shared_layers": shared_layers, "batch_first": batch_first}
    mlp = EnsembleMLP(I, HIDDEN, O, E, activation="silu", bias=bias, **options, **DOUBLE)
    x = torch.randn(E, B, I, **DOUBLE)
    own = torch.stack([member(mlp, x[e], e) for e in range(E)])
    same = torch.stack([member(mlp, x[0], e) for e in range(E)])
    results = mlp(x.transpose(0, 1) if batch_first else x), mlp(x[0])
    for actual, expected in zip(results, (own, same)):
        y = actual.transpose(0, 1) if batch_first else actual
        close(y, expected)
        weight = torch.randn_like(expected)
        grads = (torch.autograd.grad((t * weight).sum(), list(mlp.parameters())) for t in (y, expected))
        for a, b in zip(*grads):
            close(a, b)
    for e in range(-E, E):
        close(mlp(x[0], member=e), member(mlp, x[0], e % E))


@shared
def test_parameters_of_shared_layers(shared_layers):
    mlp = EnsembleMLP(I, HIDDEN, O, E, shared_layers=shared_layers)
    sizes = {name: list(value.shape) for name, value in mlp.state_dict().items()}
    expected = {}
    for n, (i, o) in enumerate([(I, 6), (6, 9), (9, O)]):
        copies = 1 if n < shared_layers else E
        expected |= {f"layers.{n}.weight": [copies, o, i], f"layers.{n}.bias": [copies, o]}
    assert sizes == expected
    other = EnsembleMLP(I, HIDDEN, O, E, shared_layers=shared_layers)
    other.load_state_dict(mlp.state_dict())
    x = torch.randn(B, I)
    assert torch.equal(other(x), mlp(x))


def test_shared_layers_are_initialized_as_one_linear_layer(seed):
    torch.manual_seed(seed)
    mlp = EnsembleMLP(I, [6], O, E, shared_layers=1)
    torch.manual_seed(seed)
    trunk, head = EnsembleLinear(I, 6, 1), EnsembleLinear(6, O, E)
    for ours, expected in zip(mlp.layers, (trunk, head)):
        assert torch.equal(ours.weight, expected.weight)
        assert torch.equal(ours.bias, expected.bias)


def test_gradient_of_a_shared_layer_is_the_sum_over_members():
    mlp = EnsembleMLP(I, [6], O, E, activation="tanh", shared_layers=1, **DOUBLE)
    x = torch.randn(E, B, I, **DOUBLE)
    trunk = mlp.layers[0].weight
    (total,) = torch.autograd.grad(mlp(x).sum(), trunk)
    close(total, sum(torch.autograd.grad(mlp(x)[e].sum(), trunk)[0] for e in range(E)))


def test_without_hidden_layers():
    mlp = EnsembleMLP(I, [], O, E, out_activation="gelu", shared_layers=0, **DOUBLE)
    x = torch.randn(B, I, **DOUBLE)
    close(mlp(x), torch.stack([member(mlp, x, e) for e in range(E)]))


def test_attributes_and_repr():
    mlp = EnsembleMLP(I, HIDDEN, O, E, activation="silu", out_activation="tanh", shared_layers=2)
    assert (mlp.activation, mlp.out_activation, mlp.shared_layers) == ("silu", "tanh", 2)
    text = repr(mlp)
    assert text.count("num_members=1,") == 2
    assert text.count("activation='silu'") == 2
    assert text.count("activation='tanh'") == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how):
    mlp = EnsembleMLP(I, HIDDEN, O, E, out_activation="tanh", shared_layers=1)
    x = torch.randn(B, I)
    expected = mlp(x)
    other = how(mlp)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(mlp(x), expected)


@shared
def test_functional_call(shared_layers):
    mlp = EnsembleMLP(I, HIDDEN, O, E, shared_layers=shared_layers)
    x = torch.randn(B, I)
    other = EnsembleMLP(I, HIDDEN, O, E, shared_layers=shared_layers)
    before = mlp(x)
    assert torch.equal(functional_call(mlp, dict(other.named_parameters()), (x,)), other(x))
    assert torch.equal(mlp(x), before)


def test_parametrized_layers():
    """A weight that is computed from other parameters, again at each call; gradients reach those."""

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0, **DOUBLE))

        def forward(self, weight):
            return weight * self.scale

    mlp = EnsembleMLP(I, HIDDEN, O, E, shared_layers=1, **DOUBLE)
    x = torch.randn(B, I, **DOUBLE)
    scaled = Scaled()
    parametrize.register_parametrization(mlp.layers[1], "weight", scaled)
    parametrizations.weight_norm(mlp.layers[2])
    for _ in range(2):
        y = mlp(x)
        close(y, torch.stack([member(mlp, x, e) for e in range(E)]))
        y.sum().backward()
        assert all(p.grad is not None for p in mlp.parameters())
        with torch.no_grad():
            scaled.scale.add_(1)
        assert not torch.equal(mlp(x), y)
    parametrize.remove_parametrizations(mlp.layers[1], "weight")
    close(mlp(x), torch.stack([member(mlp, x, e) for e in range(E)]))


def test_frozen_layers_are_left_alone():
    mlp = EnsembleMLP(I, HIDDEN, O, E, shared_layers=1)
    mlp.layers[0].requires_grad_(False)
    mlp(torch.randn(B, I)).square().sum().backward()
    assert [p.grad is not None for p in mlp.parameters()] == [False, False, True, True, True, True]


def test_training_changes_every_layer():
    mlp = EnsembleMLP(I, HIDDEN, O, E, activation="gelu", shared_layers=2)
    before = copy.deepcopy(mlp.state_dict())
    optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-2)
    x, target = torch.randn(64, I), torch.randn(64, O)
    losses = []
    for _ in range(60):
        loss = (mlp(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


@shared
def test_hooks_of_the_layers_run(shared_layers):
    """Pruning and the older weight_norm set a layer's weight in a hook before its forward."""
    mlp = EnsembleMLP(I, HIDDEN, O, E, shared_layers=shared_layers, **DOUBLE)
    prune.random_unstructured(mlp.layers[1], "weight", amount=0.5)
    seen = []
    mlp.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.no_grad():
        mlp.layers[1].weight_orig.mul_(3)  # the weight itself follows at the next call
    for x in (torch.randn(E, B, I, **DOUBLE), torch.randn(B, I, **DOUBLE)):
        actual = mlp(x)
        assert (mlp.layers[1].weight == 0).sum() == mlp.layers[1].weight.numel() // 2
        close(actual, torch.stack([member(mlp, x[e] if x.dim() == 3 else x, e) for e in range(E)]))
    assert seen == [HIDDEN[0]] * 2
