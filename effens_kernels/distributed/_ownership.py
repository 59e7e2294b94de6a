"""Which tensors of an ensemble its members own, along a first axis of members, and which they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import nn as layers
from ..ensembles import Ensemble, StackedEnsemble
from ..ops._checks import reject


class Place(NamedTuple):
    """Where a tensor is, each place once; what is tied is in several."""

    path: str
    module: nn.Module
    kind: str  # _parameters or _buffers
    name: str
    owned: bool

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.kind)[self.name]


class Layout(NamedTuple):
    places: list[Place]
    counted: list[nn.Module]  # those with a number of members
    num_members: int


def layout(ensemble: nn.Module) -> Layout:
    """Of what `ek.stack` or `ek.convert` made, or of layers of `ek.nn`; ValueError about everything else."""
    places, counted = [], []
    stacked = _of_stacks(ensemble)
    alone = {id(layer) for layer in _shared_layers(ensemble)}
    for path, module in ensemble.named_modules():
        where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
        if parametrize.is_parametrized(module):
            reject("shard", "ensemble", "without parametrizations", where)
        members = None if id(module) in alone else getattr(module, "num_members", None)
        if members is not None:
            counted.append(module)
            if members != counted[0].num_members:
                expected = f"of one number of members, {counted[0].num_members}"
                reject("shard", "ensemble", expected, f"{where} of {members}")
        for kind, name in _tensors(module):
            at = f"{path}.{name}" if path else name
            owned = stacked[at] if at in stacked else members is not None and _owns(module, name, where)
            places.append(Place(at, module, kind, name, owned))
    if not any(place.owned for place in places):
        expected = "made by ek.stack or ek.convert, or of layers of ek.nn with members"
        reject("shard", "ensemble", expected, f"{type(ensemble).__name__} without an axis of members")
    size = counted[0].num_members
    for place in places:
        if place.owned and (place.tensor.dim() == 0 or place.tensor.shape[0] != size):
            reject("shard", place.path, f"[E={size}, ...]", place.tensor)
    return Layout(places, counted, size)


def takes_members(ensemble: nn.Module) -> bool:
    """Whether `per_member` tells what its inputs are, and every tensor of its result is [E, ...]."""
    return isinstance(ensemble, (StackedEnsemble, Ensemble))


def _of_stacks(ensemble: nn.Module) -> dict[str, bool]:
    """Whether members own it, for each tensor of a StackedEnsemble, wherever there is one."""
    owned = {}
    for path, stack in ensemble.named_modules():
        if isinstance(stack, StackedEnsemble):
            for below, part in stack.named_modules():
                for _, name in _tensors(part):
                    at = f"{below}.{name}" if below else name
                    owned[f"{path}.{at}" if path else at] = at not in getattr(stack, "shared", ())
    return owned


def _shared_layers(ensemble: nn.Module) -> Iterator[nn.Module]:
    """Layers of one member, which all have in common."""
    for module in ensemble.modules():
        if isinstance(module, layers.EnsembleMLP):
            yield from module.layers[: module.shared_layers]


def _tensors(module: nn.Module) -> Iterator[tuple[str, str]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield kind, name


def _owns(module: nn.Module, name: str, where: str) -> bool:
    """Members own what their layer has, but for the weights of BatchEnsemble, and biases that are shared by request."""
    if not any(kind.__module__.startswith(f"{layers.__name__}.") for kind in type(module).__mro__):
        reject("shard", "ensemble", "one whose layers with members are of ek.nn", f"{where} with {name}")
    if name == "bias" and getattr(module, "shared_bias", False):
        return False
    scaled = any(f"_{other}".endswith(("_r", "_s")) for other in module._parameters)  # as BatchEnsemble's are
    return not (scaled and name.endswith("weight"))
