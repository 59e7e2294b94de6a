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


def members_first(layer: str, x: Tensor, num_members: int, batch_first: bool) -> Tensor:
    """The layer's input as the ops take it: [B, I] as it is, [B, E, I] as a [E, B, I] view."""
    if not isinstance(x, Tensor):
        reject(layer, "input", "a torch.Tensor", x, TypeError)
    layout = "[B, E, I]" if batch_first else "[E, B, I]"
    if x.dim() not in (2, 3):
        reject(layer, "input", f"[B, I] or {layout}", x)
    if x.dim() == 2:
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


def one_member(layer: str, x: Tensor, member: int, num_members: int) -> slice:
    """The slice of parameters of one member, whose input is [B, I] and whose output is [B, ...]."""
    if isinstance(member, bool) or not isinstance(member, int):
        reject(layer, "member", "None or an int", repr(member), TypeError)
    if not -num_members <= member < num_members:
        reject(layer, "member", f"in [-{num_members}, {num_members})", repr(member), IndexError)
    if isinstance(x, Tensor) and x.dim() != 2:
        reject(layer, "input", "[B, I] when member is given", x)
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
