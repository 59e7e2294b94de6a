"""Which tensors of an ensemble its members own, along a first axis of members, and which they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ensembles import Ensemble, StackedEnsemble
from ..ensembles.stack import _Part
from ..nn import EnsembleLayerNorm, EnsembleLinear, EnsembleMLP, MultiHeadLinear
from ..nn._mixture import Mixture
from ..nn.batchensemble import _BatchEnsemble
from ..nn.norm import _EnsembleBatchNorm
from ..ops._checks import reject

# Names of the tensors that members share, in layers of which they own all others.
SHARED: dict[type[nn.Module], tuple[str, ...]] = {
    _Part: (),
    EnsembleLinear: (),
    MultiHeadLinear: (),
    EnsembleLayerNorm: (),
    _EnsembleBatchNorm: (),
    _BatchEnsemble: ("weight",),
    Mixture: (),
}


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
    counted: list[nn.Module]  # which have a num_members to set
    num_members: int


def layout(ensemble: nn.Module) -> Layout:
    """Of what `ek.stack`, `ek.convert` or layers of `ek.nn` are; ValueError about everything else."""
    shared = {
        id(layer)
        for module in ensemble.modules()
        if isinstance(module, EnsembleMLP)
        for layer in module.layers[: module.shared_layers]
    }
    places, counted = [], []
    stacked: set[int] = set()
    for path, module in ensemble.named_modules():
        where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
        if parametrize.is_parametrized(module):
            reject("shard", "ensemble", "without parametrizations", where)
        if isinstance(module, StackedEnsemble):
            stacked |= {id(part) for part in module.modules()}
        members = getattr(module, "num_members", None) if id(module) not in shared else None
        owns = members is not None or id(module) in stacked
        if members is not None:
            counted.append(module)
            if members != counted[0].num_members:
                expected = f"of one number of members, {counted[0].num_members}"
                reject("shard", "ensemble", expected, f"{where} of {members}")
        for kind, name in _tensors(module):
            owned = owns and name not in _shared_names(module, where)
            places.append(Place(f"{path}.{name}" if path else name, module, kind, name, owned))
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


def _tensors(module: nn.Module) -> Iterator[tuple[str, str]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield kind, name


def _shared_names(module: nn.Module, where: str) -> tuple[str, ...]:
    for kind, names in SHARED.items():
        if isinstance(module, kind):
            return (*names, "bias") if getattr(module, "shared_bias", False) else names
    return reject("shard", "ensemble", f"of {', '.join(kind.__name__.strip('_') for kind in SHARED)} layers", where)
