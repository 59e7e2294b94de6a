"""ek.stack refuses what it cannot do, and says what, where and why."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from stack_cases import B, E
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effens_kernels as ek


class Net(nn.Module):
    def __init__(self, width: int = 8, p: float = 0.1, **attributes: object) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.Dropout(p), nn.Linear(width, 4))
        self.norm = nn.BatchNorm1d(4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers(x))


class Other(Net):
    pass


def changed(change, *arguments: object, **options: object) -> nn.Module:
    model = Net(*arguments, **options)
    change(model)
    return model


def tie(model: nn.Module) -> None:
    model.norm.weight = model.norm.bias


def hook(model: nn.Module) -> None:
    model.layers[0].register_forward_hook(lambda *arguments: None)


def tensor_attribute(value: float) -> nn.Module:
    return Net(mask=torch.full((4,), value))


class Lambda(Net):
    def __init__(self, scale: float) -> None:
        super().__init__(rule=lambda x: x * scale)


ONE = Net()
DIFFERENT = {
    "type": ([Net(), Other()], "models[1]: Other, in models[0] Net"),
    "type of a module": (
        [Net(), changed(lambda m: m.layers.__setitem__(1, nn.ReLU()))],
        "models[1].layers.1: ReLU, in models[0] Dropout",
    ),
    "shape": ([Net(), Net(9)], "models[1].layers.0.weight: float32[9, 6] on cpu, in models[0] float32[8, 6] on cpu"),
    "option": ([Net(), Net(), changed(lambda m: setattr(m.norm, "momentum", 0.3))], "models[2].norm.momentum: 0.3, in"),
    "other dropout": ([nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(p)) for p in (0.1, 0.2)], "models[1].1.p: 0.2"),
    "eps": ([Net(), changed(lambda m: setattr(m.norm, "eps", 1e-3))], "models[1].norm.eps: 0.001, in models[0] 1e-05"),
    "dtype": ([Net(), Net().double()], "models[1].layers.0.weight: float64"),
    "device": ([Net(), Net().to("meta")], "on meta, in models[0] float32[8, 6] on cpu"),
    "frozen": ([Net(), changed(lambda m: m.norm.bias.requires_grad_(False))], "models[1].norm.bias: float32[4]"),
    "mode": ([Net(), Net().eval()], "models[1].training: False, in models[0] True"),
    "more modules": ([Net(), changed(lambda m: m.add_module("more", nn.ReLU()))], "models[1].more: ReLU"),
    "fewer modules": ([changed(lambda m: m.add_module("more", nn.ReLU())), Net()], "models[1].more: no such module"),
    "more tensors": (
        [Net(), changed(lambda m: m.register_buffer("more", torch.zeros(2)))],
        "models[1].more: float32[2] on cpu, in models[0] missing",
    ),
    "no bias": ([Net(), changed(lambda m: m.layers[0].register_parameter("bias", None))], "layers.0.bias: None"),
    "attribute": ([Net(), Net(scale=2)], "models[1].scale: 2, in models[0] missing"),
    "attribute of other type": ([Net(scale=1), Net(scale=1.0)], "models[1].scale: 1.0, in models[0] 1"),
    "tensor": ([tensor_attribute(1.0), tensor_attribute(2.0)], "models[1].mask: tensor([2., 2., 2., 2.])"),
    "function": ([Lambda(1.0), Lambda(2.0)], "models[1].rule: one that differs, in models[0] <function"),
    "ties": ([Net(), changed(tie)], "models[1].norm.bias: the tensor at norm.weight, in models[0] a tensor of its own"),
}
REFUSED = {
    "shared parameter": (lambda: [ONE, ONE], "models[1].layers.0.weight should be the model's own"),
    "hooks": (lambda: [changed(hook), changed(hook)], "models[0].layers.0 should be without hooks"),
    "lazy": (lambda: [nn.LazyLinear(4), nn.LazyLinear(4)], "models[0].weight should be initialized"),
    "hidden module": (lambda: [Net(more=[nn.ReLU()])], "models[0].more[0] should be registered"),
    "hidden parameter": (lambda: [Net(more={"a": nn.Parameter(torch.ones(1))})], "models[0].more['a'] should be reg"),
    "a result": (lambda: [Net(last=torch.ones(1, requires_grad=True) * 2)], "models[0].last should be a leaf"),
    "nothing": (lambda: [nn.ReLU()], "models should be with parameters or buffers"),
    "no models": (lambda: [], "models should be at least one model"),
    "compiled": (lambda: [torch.compile(Net())], "models[0] should be a module that is not compiled"),
    "wrapped": (lambda: [nn.DataParallel(Net())], "models[0] should be a plain module, got DataParallel"),
    "scripted": (lambda: [torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))], "models[0] should be a Python module"),
    "sparse": (
        lambda: [changed(lambda m: m.register_buffer("s", torch.eye(2).to_sparse()))],
        "models[0].s should be a dense",
    ),
    "an ensemble": (lambda: [ek.stack([Net()])], "models[0] should be a plain module, got StackedEnsemble"),
}
TYPES = {
    "one model": lambda: ek.stack(Net()),
    "a number": lambda: ek.stack(3),
    "no module": lambda: ek.stack([Net(), 3]),
    "unstack a model": lambda: ek.unstack(Net()),
    "member": lambda: ek.stack([Net()])(torch.ones(2, 6), member=1.5),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_first_difference_is_named(name):
    models, said = DIFFERENT[name]
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        ek.stack(models)
    assert str(caught.value).startswith("stack: models should be of one architecture, got models[")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, said = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(said)):
        ek.stack(make())


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    with pytest.raises(TypeError, match="should be"):
        TYPES[name]()


def test_alike_enough():
    """What is no option, or is equal without being one object."""
    values = {"mask": torch.ones(3), "nan": float("nan"), "sizes": [1, (2, 3)], "rule": torch.tanh, "kind": nn.ReLU}
    ensemble = ek.stack([Net(**values, own=lambda x: x + 1) for _ in range(E)])
    assert ensemble(torch.randn(B, 6)).shape == (E, B, 4)
    assert ek.unstack(ensemble)[1].sizes == [1, (2, 3)]


def test_arrays_are_compared_by_value():
    grid = np.array([0.0, 1.0, float("nan")])
    assert ek.stack([Net(grid=grid.copy()) for _ in range(E)])(torch.randn(B, 6)).shape == (E, B, 4)
    for other in (grid + 1, grid[:2], grid.astype(np.float32)):
        with pytest.raises(ValueError, match=r"got models\[1\]\.grid"):
            ek.stack([Net(grid=grid), Net(grid=other)])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"member": 3}, IndexError, "member should be in [-3, 3)"),
        ({"member": True}, TypeError, "member should be None or an int"),
        ({"per_member": True}, ValueError, "input should be [E=3, ...] with per_member=True"),
    ],
    ids=str,
)
def test_bad_calls(arguments, error, said):
    with pytest.raises(error, match=re.escape(said)):
        ek.stack([Net() for _ in range(E)])(torch.randn(B, 6), **arguments)


def test_randomness():
    with pytest.raises(ValueError, match="randomness should be one of 'different', 'same'"):
        ek.stack([Net()], randomness="none")


# ---------------------------------------------------------------------------------- code that cannot run for all


class Part(nn.Module):
    """A rule applied to what differs between members."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.linear, x)


def write_shared(linear: nn.Module, x: Tensor) -> Tensor:
    x += linear.bias
    return x


def store_shared(linear: nn.Module, x: Tensor) -> Tensor:
    rows = torch.zeros(B, 6)
    rows[:, 0] = linear(x)[:, 0]
    return rows


CANNOT = {
    "item": (lambda linear, x: linear(x) * linear.bias.sum().item(), "becomes one Python number"),
    "if": (lambda linear, x: x if linear(x).sum() > 0 else -x, "which way the code goes"),
    "numpy": (lambda linear, x: torch.as_tensor(linear(x).detach().numpy()), "values are taken out of PyTorch"),
    "mask": (lambda linear, x: x[linear(x) > 0], "the shape of the result"),
    "nonzero": (lambda linear, x: linear(x).nonzero(), "the shape of the result"),
    "write": (write_shared, "writes values of each member into a tensor that all members share"),
    "store": (store_shared, "writes values of each member into a tensor that all members share"),
    "checkpoint": (lambda linear, x: checkpoint(linear, x, use_reentrant=False), "goes around the whole ensemble"),
    "reentrant": (lambda linear, x: checkpoint(linear, x, use_reentrant=True), "goes around the whole ensemble"),
    "checkpoint without layers": (
        lambda linear, x: checkpoint(torch.sin, linear(x), use_reentrant=False),
        "goes around",
    ),
    "format": (
        lambda linear, x: linear(x)[:, None, None].contiguous(memory_format=torch.channels_last),
        "x.to(memory_format=...) can be mapped",
    ),
    "shapes": (lambda linear, x: linear(x) @ torch.ones(5, 5), "failed (PyTorch:"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_run_for_all_is_named(name):
    rule, reason = CANNOT[name]
    ensemble = ek.stack([nn.Sequential(nn.ReLU(), Part(rule)) for _ in range(E)])
    with pytest.raises(RuntimeError, match=re.escape(reason)) as caught:
        ensemble(torch.randn(B, 6, requires_grad=name == "reentrant"))
    assert str(caught.value).startswith("stack: 1")
    assert all(p.is_meta for p in ensemble._plain.parameters())  # nothing of the call is left behind


def test_layers_of_a_sequential_are_named():
    """Linear layers and activations, which run as one call."""
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Sequential(nn.Linear(5, 2), nn.Tanh()))
    with pytest.raises(RuntimeError, match=r"^stack: 2\.0 \(Linear\) failed"):
        ek.stack([copy.deepcopy(net) for _ in range(E)])(torch.randn(B, 6))


def test_packed_sequences_are_named():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]))
            return self.lstm(packed)[1][0]

    with pytest.raises(RuntimeError, match=r"stack: lstm \(LSTM\) cannot run .* no rule to run this operation"):
        ek.stack([Packed() for _ in range(E)])(torch.randn(3, 2, 6))
