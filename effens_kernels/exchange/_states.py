"""States of models under the names and axis orders of another library, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import reject

Change = Callable[[Tensor, nn.Module], Tensor]


def _same(value: Tensor, layer: nn.Module) -> Tensor:
    return value


class Entry(NamedTuple):
    """One tensor of a layer of ours, and what it is in the other library; None where it is all ones and has no name.

    `outward` also says the shape there, by a meta tensor.
    """

    ours: str
    theirs: str | None
    outward: Change = _same
    inward: Change = _same


# Of a layer of ours at a path: its entries, or None if it has none but plain names.
Entries = Callable[[nn.Module, str], Sequence[Entry] | None]


class _Place(NamedTuple):
    entry: Entry
    theirs: str | None  # the whole name
    layer: nn.Module


def _places(op: str, model: object, entries: Entries) -> Iterator[tuple[str, Tensor, _Place]]:
    """Every name of the model's state_dict, its value, and where the other library has it."""
    if not isinstance(model, nn.Module):
        reject(op, "model", "a torch.nn.Module", type(model).__name__, TypeError)
    found: dict[str, _Place] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        known = entries(layer, path)
        if known is None and type(layer).__module__.startswith("effens_kernels.nn."):
            if next(layer.parameters(), None) is not None:
                reject(op, "model", "of layers that have a counterpart", f"{type(layer).__name__} at {path!r}")
        prefix = f"{path}." if path else ""
        for entry in known or ():
            theirs = None if entry.theirs is None else prefix + entry.theirs
            found[prefix + entry.ours] = _Place(entry, theirs, layer)
    for name, value in model.state_dict().items():
        yield name, value, found.get(name, _Place(Entry(name, name), name, model))


def outward(op: str, model: nn.Module, entries: Entries) -> dict[str, Tensor]:
    """The model's state as the other library has it."""
    state = {}
    for name, value, (entry, theirs, layer) in _places(op, model, entries):
        if theirs is not None:
            state[theirs] = entry.outward(value, layer).contiguous()
        elif not bool((value == 1).all()):
            reject(op, "model", f"of a {name} of ones, as there is none in the other library", value)
    return state


def inward(op: str, model: nn.Module, state: object, entries: Entries) -> dict[str, Tensor]:
    """The other library's state as the model has it."""
    if not isinstance(state, Mapping):
        reject(op, "state", "a state_dict", type(state).__name__, TypeError)
    translated, used = {}, set()
    for name, own, (entry, theirs, layer) in _places(op, model, entries):
        if theirs is None:
            translated[name] = torch.ones(own.shape)
            continue
        if not isinstance(value := state.get(theirs), Tensor):
            reject(op, "state", f"with a tensor {theirs!r}", "none" if value is None else type(value).__name__)
        shape = entry.outward(own.to("meta"), layer).shape
        if value.shape != shape:
            reject(op, f"state[{theirs!r}]", f"of shape {list(shape)}", value)
        translated[name] = entry.inward(value, layer)
        used.add(theirs)
    if rest := [key for key in state if key not in used]:
        reject(op, "state", "of the model's layers alone", f"also {', '.join(map(repr, rest))}")
    return translated


def fill(op: str, layer: nn.Module, theirs: nn.Module, entries: Entries) -> nn.Module:
    """`layer`, made on the meta device, with copies of their values, trained or not as theirs and in their mode."""
    state = inward(op, layer, theirs.state_dict(), entries)
    place = next(iter(theirs.state_dict().values()), torch.empty(0)).device
    copies = {name: state[name].to(place, own.dtype, copy=True) for name, own in layer.state_dict().items()}
    layer.load_state_dict({name: value.contiguous() for name, value in copies.items()}, assign=True)
    trained = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    counterparts = {entry.ours: entry.theirs for entry in entries(layer, "") or ()}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trained.get(counterparts.get(name, name), False))
    return layer.train(theirs.training)
