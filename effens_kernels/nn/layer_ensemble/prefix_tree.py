"""Which prefixes a set of paths has, layer by layer: integers alone, no layer is known here.

A path is one option for each layer.  A prefix is the options of its first layers; paths share it as long as they agree.
The prefixes of a layer are in the order (option, prefix without it), so that those of an option are next to each other;
those of the last layer are in the caller's order of paths, unless paths are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Places = slice | Tensor  # indices, as a slice where they are one

REMEMBERED = 8  # trees of the last sets of paths


class Run(NamedTuple):
    """The prefixes of a layer that end in one option."""

    option: int
    count: int
    parents: Places  # among the prefixes of the layer before
    places: Places  # among the prefixes of this layer


class Level(NamedTuple):
    """The prefixes that end at one layer."""

    parent: Tensor  # [U] which prefix of the layer before each one continues
    option: Tensor  # [U] and by which option
    runs: tuple[Run, ...]
    order: Tensor | None  # [U] of the prefixes, taken run after run; None: as they lie
    parents: int  # how many prefixes the layer before has
    is_product: bool  # every prefix before continues by every option, option by option
    is_step: bool  # every prefix before continues once, in its order
    is_diagonal: bool  # the prefixes' options are 0, 1, 2, ...

    @property
    def size(self) -> int:
        return len(self.parent)


class PrefixTree:
    """The prefixes of paths `samples` `[S, N]`, of which layer q has `num_options[q]` options.

    Attributes:
        levels: one for each layer.
        inverse: `[S]`, which prefix of the last layer each path is; None: they are in the order of the paths.
    """

    @torch.inference_mode(False)  # a tree that was first needed there also serves training
    def __init__(self, samples: Tensor, num_options: Sequence[int]) -> None:
        self.num_paths, self.num_options = len(samples), tuple(num_options)
        levels = []
        node = samples.new_zeros(len(samples), dtype=torch.int64)  # the prefix of each path so far
        before = 1
        for options, count in zip(samples.long().unbind(1), self.num_options):
            keys, node = torch.unique(options * before + node, return_inverse=True)
            option, parent = keys.div(before, rounding_mode="floor"), keys.remainder(before)
            levels.append(_level(parent, option, before, count))
            before = len(keys)
        self.inverse: Tensor | None = None
        if before < self.num_paths:
            self.inverse = node
        else:  # each path once: the last layer computes them in the order that they are asked for
            last = levels[-1]
            levels[-1] = _level(last.parent[node], last.option[node], last.parents, self.num_options[-1])
        self.levels = tuple(levels)
        self._elsewhere: dict[torch.device, PrefixTree] = {}

    @property
    def num_prefixes(self) -> tuple[int, ...]:
        """How many of each layer are computed."""
        return tuple(level.size for level in self.levels)

    def on(self, device: torch.device) -> PrefixTree:
        """The same, with its tensors on `device`."""
        here = self.levels[0].parent.device
        if device == here:
            return self
        if device not in self._elsewhere:
            tree = object.__new__(PrefixTree)
            tree.num_paths, tree.num_options, tree._elsewhere = self.num_paths, self.num_options, {}
            with torch.inference_mode(False):
                tree.inverse = None if self.inverse is None else self.inverse.to(device)
                tree.levels = tuple(_moved(level, device) for level in self.levels)
            self._elsewhere[device] = tree
        return self._elsewhere[device]

    def __repr__(self) -> str:
        return f"PrefixTree(num_paths={self.num_paths}, num_prefixes={self.num_prefixes})"


class TreeCache:
    """The trees of the sets of paths seen last, found by their values."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, PrefixTree]] = []  # the latest first

    def get(self, samples: Tensor) -> PrefixTree | None:
        for n, (known, tree) in enumerate(self._known):
            if known.shape == samples.shape and torch.equal(known, samples):
                self._known.insert(0, self._known.pop(n))
                return tree
        return None

    def put(self, samples: Tensor, tree: PrefixTree) -> None:
        self._known.insert(0, (samples.clone(), tree))
        del self._known[REMEMBERED:]


def _level(parent: Tensor, option: Tensor, parents: int, count: int) -> Level:
    """`count` options, `parents` prefixes of the layer before."""
    by_option = option.argsort(stable=True)
    runs, begin = [], 0
    used, sizes = torch.unique_consecutive(option[by_option], return_counts=True)
    for k, size in zip(used.tolist(), sizes.tolist()):
        places = by_option[begin : begin + size]
        runs.append(Run(k, size, _places(parent[places]), _places(places)))
        begin += size
    every = torch.arange(len(parent))
    in_order = torch.equal(by_option, every)
    return Level(
        parent,
        option,
        tuple(runs),
        None if in_order else by_option.argsort(),
        parents,
        is_product=torch.equal(option * parents + parent, torch.arange(count * parents)),
        is_step=torch.equal(parent, every) and len(parent) == parents,
        is_diagonal=torch.equal(option, every),
    )


def _places(indices: Tensor) -> Places:
    """Increasing indices at one distance are a slice."""
    first, count = int(indices[0]), len(indices)
    step = int(indices[1]) - first if count > 1 else 1
    if step > 0 and torch.equal(indices, torch.arange(first, first + count * step, step)):
        return slice(first, first + (count - 1) * step + 1, step)
    return indices


def _moved(level: Level, device: torch.device) -> Level:
    def there(t: Tensor | slice | None) -> Tensor | slice | None:
        return t.to(device) if isinstance(t, Tensor) else t

    runs = tuple(run._replace(parents=there(run.parents), places=there(run.places)) for run in level.runs)
    return level._replace(parent=there(level.parent), option=there(level.option), order=there(level.order), runs=runs)
