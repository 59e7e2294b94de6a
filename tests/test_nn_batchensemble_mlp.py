"""BatchEnsembleMLP equals its layers one after the other, in every layout, and is an ordinary module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from effens_kernels.nn import BatchEnsembleLinear, BatchEnsembleMLP
from effens_kernels.ops._activations import ACTIVATIONS

E, B, I, O = 3, 11, 7, 4
HIDDEN = [6, 9]
DOUBLE = {"dtype": torch.float64}
LAYOUTS = {"members_first": {}, "batch_first": {"batch_first": True}, "tiled": {"tiled": True}}
BIASES = {"own_bias": {}, "shared_bias": {"shared_bias": True}, "no_bias": {"bias": False}}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def stored(t: Tensor, layout: str) -> Tensor:
    return {"members_first": t, "batch_first": t.transpose(0, 1), "tiled": t.flatten(0, 1)}[layout]


def member(mlp: BatchEnsembleMLP, x: Tensor, e: int) -> Tensor:
    """What member e is, in PyTorch's operations."""
    last = len(mlp.layers) - 1
    for n, layer in enumerate(mlp.layers):
        x = F.linear(x * layer.r[e], layer.weight) * layer.s[e]
        if layer.bias is not None:
            x = x + (layer.bias if layer.bias.dim() == 1 else layer.bias[e])
        x = ACTIVATIONS[mlp.out_activation if n == last else mlp.activation].apply(x)
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("hidden", [[], HIDDEN], ids=str)
@pytest.mark.parametrize("out_activation", [None, "tanh"])
def test_a_loop_over_members(layout, bias, hidden, out_activation):
    options = {"out_activation": out_activation, **LAYOUTS[layout], **BIASES[bias]}
    mlp = BatchEnsembleMLP(I, hidden, O, E, activation="silu", **options, **DOUBLE)
    x = torch.randn(E, B, I, **DOUBLE)
    own = torch.stack([member(mlp, x[e], e) for e in range(E)])
    pairs = [(mlp(stored(x, layout)), own)]
    if layout != "tiled":
        pairs.append((mlp(x[0]), torch.stack([member(mlp, x[0], e) for e in range(E)])))
    for actual, expected in pairs:
        expected = stored(expected, layout)
        close(actual, expected)
        weight = torch.randn_like(expected)
        grads = (torch.autograd.grad((t * weight).sum(), list(mlp.parameters())) for t in (actual, expected))
        for a, b in zip(*grads):
            close(a, b)
    for e in range(-E, E):
        close(mlp(x[0], member=e), member(mlp, x[0], e % E))


def test_scales_of_the_layers():
    mlp = BatchEnsembleMLP(I, HIDDEN, O, E, init="random_sign", hidden_init="ones")
    first, *others = mlp.layers
    assert set(first.r.flatten().tolist()) <= {1.0, -1.0}
    assert all((layer.r == 1).all() and (layer.s == 1).all() for layer in others)
    assert all(layer.init == "random_sign" for layer in BatchEnsembleMLP(I, HIDDEN, O, E, init="random_sign").layers)


def test_hooks_and_parametrizations_are_seen():
    mlp = BatchEnsembleMLP(I, HIDDEN, O, E, **DOUBLE)
    x = torch.randn(B, I, **DOUBLE)
    plain = mlp(x)
    seen = []
    handle = mlp.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    close(mlp(x), plain)
    assert seen == [torch.Size([E, B, HIDDEN[1]])]
    handle.remove()
    backward = []
    handle = mlp.layers[1].register_full_backward_hook(lambda *_: backward.append(True))
    mlp(x).sum().backward()
    assert backward == [True]
    handle.remove()
    replaced = copy.deepcopy(mlp)
    replaced.layers[1] = torch.nn.Tanh()
    replaced.layers[2] = BatchEnsembleLinear(HIDDEN[0], O, E, **DOUBLE)
    close(replaced(x), replaced.layers[2](torch.tanh(replaced.layers[0](x))))
    prune.l1_unstructured(mlp.layers[0], "weight", amount=0.5)
    close(mlp(x), torch.stack([member(mlp, x, e) for e in range(E)]))

    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    mlp = BatchEnsembleMLP(I, HIDDEN, O, E, **DOUBLE)
    parametrize.register_parametrization(mlp.layers[1], "weight", Twice())
    close(mlp(x), torch.stack([member(mlp, x, e) for e in range(E)]))


def test_an_ordinary_module():
    mlp = BatchEnsembleMLP(I, HIDDEN, O, E, activation="gelu", shared_bias=True, **DOUBLE)
    x = torch.randn(B, I, **DOUBLE)
    expected = mlp(x)
    assert list(dict(mlp.named_parameters()))[:4] == [f"layers.0.{name}" for name in ("weight", "r", "s", "bias")]
    other = BatchEnsembleMLP(I, HIDDEN, O, E, activation="gelu", shared_bias=True, **DOUBLE)
    other.load_state_dict(mlp.state_dict())
    for twin in (other, copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        close(twin(x), expected)
    close(functional_call(other, dict(mlp.named_parameters()), (x,)), expected)
    mlp.reset_parameters()
    assert not torch.equal(mlp(x), expected)
    assert "num_members=3" in repr(mlp)
    assert isinstance(mlp.layers[0], BatchEnsembleLinear)
    with torch.no_grad():
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)
    close(compiled, mlp(x))


def test_bad_input():
    mlp = BatchEnsembleMLP(I, HIDDEN, O, E)
    with pytest.raises(ValueError, match=r"BatchEnsembleMLP: input should be \[E, B, I\] with E=3"):
        mlp(torch.zeros(E + 1, B, I))
    with pytest.raises(ValueError, match=r"rank1_mlp: x should be \[..., I=7\]"):
        mlp(torch.zeros(B, I + 1))
    with pytest.raises(IndexError, match="BatchEnsembleMLP: member should be in"):
        mlp(torch.zeros(B, I), member=E)
    with pytest.raises(ValueError, match="BatchEnsembleMLP: activation should be one of"):
        BatchEnsembleMLP(I, HIDDEN, O, E, activation="softmax")
    with pytest.raises(ValueError, match="BatchEnsembleMLP: tiled should be False with batch_first=True"):
        BatchEnsembleMLP(I, HIDDEN, O, E, batch_first=True, tiled=True)
    with pytest.raises(ValueError, match="num_members should be at least 1"):
        BatchEnsembleMLP(I, HIDDEN, O, 0)
    with pytest.raises(ValueError, match="init should be one of"):
        BatchEnsembleMLP(I, HIDDEN, O, E, hidden_init="zeros")
