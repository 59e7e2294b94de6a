"""Layers of another library get this package's forward; parameters, buffers, names and hooks stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from torch import nn

from ..nn._fusing import fused_name
from ..nn._layout import has_hooks
from ..ops._checks import reject


class Accelerated(nn.Module):
    """What a layer becomes an instance of.  It was constructed as another class, whose attributes it has."""


class Fusing(Accelerated):
    """A layer whose product takes an activation."""

    activation: str | None = None

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" if self.activation else ""


def is_of(module: nn.Module, *libraries: str) -> bool:
    """Whether the class is defined in one of these packages, or in a copy of it within another."""
    return not set(libraries).isdisjoint(type(module).__module__.split("."))


def accelerate(op: str, model: nn.Module, table: Mapping[str, type[Accelerated]], *libraries: str) -> nn.Module:
    """Give each layer whose class the table names the forward of its entry; in place."""
    if not isinstance(model, nn.Module):
        reject(op, "model", "a torch.nn.Module", type(model).__name__, TypeError)
    ours = tuple(table.values())
    layers = [m for m in model.modules() if is_of(m, *libraries) and type(m).__name__ in table]
    if not layers and not any(isinstance(m, ours) for m in model.modules()):
        others = sorted({type(m).__name__ for m in model.modules() if is_of(m, *libraries)})
        got = f"of it only {', '.join(others)}" if others else f"{type(model).__name__} without any"
        reject(op, "model", f"with layers of {libraries[0]} ({', '.join(table)})", got)
    for layer in layers:
        layer.__class__ = table[type(layer).__name__]
    _fuse_activations(model)
    return model


def _fuse_activations(model: nn.Module) -> None:
    """An activation that follows its layer in an nn.Sequential is computed with the product."""
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for block in [m for m in model.modules() if type(m) is nn.Sequential]:
        for (_, layer), (name, then) in pairwise(list(block._modules.items())):
            activation = fused_name(then)
            if not isinstance(layer, Fusing) or activation is None:
                continue
            if layer.activation is None and uses[id(layer)] == 1 and not has_hooks(layer) and not has_hooks(then):
                layer.activation = activation
                block._modules[name] = nn.Identity().train(then.training)
