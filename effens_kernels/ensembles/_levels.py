"""torch.func.vmap with less around it: the level of a vmap entered and left, and calls beneath it.

By a rule written in Python, a small linear layer of five members takes 0.44 ms, called beneath vmap 0.11 ms; the trees
of arguments of torch.func.vmap itself take 0.25 ms for two layers, 0.5 ms for twelve (torch 2.13, one thread of a
server's CPU, 2026-11-23).  What torch.compile and torch.export have to see goes by torch.func.vmap itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.vmap import lazy_load_decompositions


def mapped(
    run: Callable[..., list[Tensor]],
    dims: Sequence[int | None],
    arguments: Sequence[object],
    members: int,
    randomness: str,
) -> list[Tensor]:
    """`torch.func.vmap(run, tuple(dims), randomness=randomness)(*arguments)`."""
    lazy_load_decompositions()
    level = _functorch._vmap_increment_nesting(members, randomness)
    try:
        given = (t if d is None else _functorch._add_batch_dim(t, d, level) for t, d in zip(arguments, dims))
        return [_functorch._remove_batch_dim(t, level, members, 0) for t in run(*given)]
    finally:
        _functorch._vmap_decrement_nesting()


def current_level() -> int | None:
    """Of the vmap that runs; None under torch.compile and torch.export."""
    return None if torch.compiler.is_compiling() else _functorch.maybe_current_level()


def differs(t: Tensor | None, level: int) -> bool:
    """Whether members differ in it, at this level."""
    return t is not None and _functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == level


def beneath(level: int, call: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`call` on tensors with members in front, where these differ, and as they are, where not.

    Its result has members in front.
    """
    saved = _functorch.pop_dynamic_layer_stack()
    try:
        result = call(*(_of_members(t) if differs(t, level) else t for t in tensors))
    finally:
        _functorch.push_dynamic_layer_stack(saved)
    return _functorch._add_batch_dim(result, 0, level)


def _of_members(t: Tensor) -> Tensor:
    dim = _functorch.maybe_get_bdim(t)
    return _functorch.get_unwrapped(t).movedim(dim, 0)


def is_result(t: Tensor) -> bool:
    """Of a call, which cannot be copied as it is."""
    return _functorch.is_batchedtensor(t) or t.grad_fn is not None


def of_member(t: Tensor, e: int) -> Tensor:
    """A copy of what is left in an attribute, which is of all members if their code assigned it in a forward."""
    if _functorch.is_batchedtensor(t):
        t = _functorch.get_unwrapped(t).select(_functorch.maybe_get_bdim(t), e)
    return t.detach().clone()
