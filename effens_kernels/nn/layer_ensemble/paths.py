"""Sets of paths: drawn at random, all of them, or the networks of a Deep Ensemble; never by listing all to choose some.

A path has one option for each layer; counted in the order of the last layer first, path n is the digits of n in the
mixed radix of the layers' numbers of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ...ops._checks import reject

_FEW = 4  # times as many paths as are wanted: so few are shuffled, among more it is drawn until all differ
_INDEXABLE = 2**40  # torch.randint is a remainder of 64 bits: even enough up to here


def at(indices: Tensor, num_options: Sequence[int]) -> Tensor:
    """`[S, N]`, the paths of numbers `[S]`."""
    digits = []
    for count in reversed(num_options):
        digits.append(indices.remainder(count))
        indices = indices.div(count, rounding_mode="floor")
    return torch.stack(digits[::-1], 1)


def drawn(count: int, num_options: Sequence[int], unique: bool, generator: torch.Generator | None) -> Tensor:
    """`[count, N]`, each path equally likely; in the order of drawing."""
    total = prod(num_options)
    if not unique:
        return _draw(count, num_options, generator)
    if count > total:
        reject("LayerEnsemble.sample", "count", f"at most the {total} paths there are with unique=True", repr(count))
    if total <= _FEW * count:
        return at(torch.randperm(total, generator=generator)[:count], num_options)
    found = _draw(count, num_options, generator)
    while True:
        found = _first_of_each(found)
        if len(found) >= count:
            return found[:count]
        found = torch.cat([found, _draw(count, num_options, generator)])


def diagonal(num_options: Sequence[int], layer: str) -> Tensor:
    """`[K, N]`: networks that share no option but those of layers that have one."""
    members = max(num_options)
    for n, count in enumerate(num_options):
        if count not in (1, members):
            expected = f"of 1 or K={members} options in each layer for diagonal paths"
            reject(layer, "layers", expected, f"{count} options in layer {n}")
    return torch.stack(
        [torch.arange(members) if count > 1 else torch.zeros(members).long() for count in num_options], 1
    )


def _draw(count: int, num_options: Sequence[int], generator: torch.Generator | None) -> Tensor:
    total = prod(num_options)
    if total <= _INDEXABLE:
        return at(torch.randint(total, (count,), generator=generator), num_options)
    return torch.stack([torch.randint(k, (count,), generator=generator) for k in num_options], 1)


def _first_of_each(paths: Tensor) -> Tensor:
    """Each path once, in the order in which they first come: sorted, the first ones would be no fair sample."""
    _, which = torch.unique(paths, dim=0, return_inverse=True)
    places = torch.arange(len(paths))
    first = torch.full_like(which[: int(which.max()) + 1], len(paths)).scatter_reduce_(0, which, places, "amin")
    return paths[first.sort().values]
