"""What the layers share: layout, choice of one member, torch.nn's initialization."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor, nn

from ..ops._checks import check_activation, reject


def positive(layer: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            reject(layer, name, "an int", repr(size), TypeError)
        if size < 1:
            reject(layer, name, "at least 1", repr(size))


def checked_activation(layer: str, activation: str | None, argument: str = "activation") -> str | None:
    check_activation(layer, activation, argument)
    return activation


def parameters(modules: Iterable[nn.Module], name: str) -> list[Tensor | None]:
    """The parameter `name` of each, without the detours of `nn.Module.__getattr__` where it is an ordinary one."""
    try:
        return [module._parameters[name] for module in modules]
    except KeyError:  # parametrized
        return [getattr(module, name) for module in modules]


def has_hooks(layer: nn.Module) -> bool:
    """Hooks that only a call of the layer itself runs."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)


def one_layout(layer: str, batch_first: bool, tiled: bool) -> None:
    if batch_first and tiled:
        reject(layer, "tiled", "False with batch_first=True", repr(tiled))


def members_first(
    layer: str, x: Tensor, num_members: int, batch_first: bool, features: str = "I", tiled: bool = False
) -> Tensor:
    """The layer's input as the ops take it: [B, ...] as it is; [B, E, ...] and [E*B, ...] as views [E, B, ...]."""
    if not isinstance(x, Tensor):
        reject(layer, "input", "a torch.Tensor", x, TypeError)
    axes = 2 + features.count(",")  # of one member's
    if tiled:
        if x.dim() != axes or x.shape[0] % num_members:
            reject(layer, "input", f"[E*B, {features}] with E={num_members} (tiled=True)", x)
        return x.unflatten(0, (num_members, x.shape[0] // num_members))
    layout = f"[B, E, {features}]" if batch_first else f"[E, B, {features}]"
    if x.dim() not in (axes, axes + 1):
        reject(layer, "input", f"[B, {features}] or {layout}", x)
    if x.dim() == axes:
        return x
    x = x.transpose(0, 1) if batch_first else x
    if x.shape[0] != num_members:
        reject(
            layer,
            "input",
            f"{layout} with E={num_members} (batch_first={batch_first})",
            x.transpose(0, 1) if batch_first else x,
        )
    return x


def as_given(y: Tensor, batch_first: bool, tiled: bool) -> Tensor:
    """A result [E, B, ...] in the layer's layout."""
    if tiled:
        return y.flatten(0, 1)
    return y.transpose(0, 1) if batch_first else y


def layout_repr(batch_first: bool, tiled: bool) -> str:
    return ", batch_first=True" * bool(batch_first) + ", tiled=True" * bool(tiled)


def one_member(layer: str, x: Tensor, member: int, num_members: int, features: str = "I") -> slice:
    """The slice of parameters of one member, whose input is [B, I] and whose output is [B, ...]."""
    if isinstance(member, bool) or not isinstance(member, int):
        reject(layer, "member", "None or an int", repr(member), TypeError)
    if not -num_members <= member < num_members:
        reject(layer, "member", f"in [-{num_members}, {num_members})", repr(member), IndexError)
    if isinstance(x, Tensor) and x.dim() != 2 + features.count(","):
        reject(layer, "input", f"[B, {features}] when member is given", x)
    member %= num_members
    return slice(member, member + 1)


@torch.no_grad()
def reset_like_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Each [O, I] of `weight` and [O] of `bias` drawn as `torch.nn.Linear` draws them, one after the other."""
    fan_in = weight.shape[-1]
    for matrix, vector in zip(weight.flatten(0, -3), repeat(None) if bias is None else bias.flatten(0, -2)):
        nn.init.kaiming_uniform_(matrix, a=5**0.5)
        if bias is not None:
            nn.init.uniform_(vector, -(fan_in**-0.5), fan_in**-0.5)
