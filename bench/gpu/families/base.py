"""What a family is: an op, the layers it is measured with, each column with its own bottleneck, and its goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

from ...contestants import Contestant, Problem, Suite
from ..measured import Layer, Line


class Grid(NamedTuple):
    """Sizes for which the fastest backend is looked for; each combination is a bucket of the dispatch table."""

    members: tuple[int, ...]
    batches: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]  # inputs, outputs
    precisions: tuple[str, ...]


# The same for every op, and without overlap between columns.
LAUNCH_GRID = Grid((8, 64), (32, 256), ((64, 64), (256, 256)), ("float32", "bfloat16"))
MEMORY_GRID = Grid((16, 256), (1, 8, 64), ((512, 512), (1024, 1024)), ("float32", "bfloat16"))
COMPUTE_GRID = Grid((4, 32), (256, 1024), ((256, 256), (512, 512), (1024, 1024)), ("float32", "tf32", "bfloat16"))


@dataclass(frozen=True)
class Column:
    """One bottleneck: a part, and a table of the report."""

    name: str
    title: str
    layers: tuple[tuple[Any, tuple[str, ...]], ...]  # workloads with precisions: a table row each
    goals: Callable[[Layer], Iterator[Line]]
    grid: Grid | None = None  # None: dispatch is left to rules
    cold: bool = False  # inputs are evicted from L2 before every step
    limit: str = "products"  # or "copy"


@dataclass(frozen=True)
class Family:
    name: str  # as the parts have it: bench-<name>-<column>
    op: str  # the public function; the dispatch table's rows bear its name
    columns: tuple[Column, ...]
    suite: Suite  # its peers, and the products that are its limit
    tiny: Any  # the workload of a rehearsal
    sizes: Callable[[Any], tuple[int, ...]]  # of a workload, what dispatch sees: E, B, I, O, or M, T, N
    options: Callable[[Any], dict[str, Any]]  # that the op is called with, besides its tensors
    from_function: Callable[..., Contestant]  # (problem, name, function of the op's tensors, **labels)
    moved_bytes: Callable[[Any, torch.dtype], tuple[int, int]]  # that forward and backward cannot avoid to move
    bounds: Callable[[Problem], list[Contestant]] = lambda problem: []  # limits beside the column's
    variants: Callable[[Problem], list[Contestant]] = lambda problem: []  # ours, by what a rule would choose otherwise
    of_sizes: Callable[..., Any] | None = None  # (E, B, I, O): the workload that stands for a bucket of a grid

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def part(self, column: Column) -> str:
        return f"bench-{self.name}-{column.name}"

    def rows(self, column: Column, rehearsal: bool) -> list[tuple[Any, str]]:
        """Workloads with precisions."""
        if rehearsal:
            return [(self.tiny, "float32")]
        return [(workload, name) for workload, names in column.layers for name in names]

    def buckets(self, column: Column, rehearsal: bool) -> list[tuple[Any, str]]:
        """The same, for the dispatch table."""
        if column.grid is None:
            return []
        if rehearsal:
            return [(self.tiny, "bfloat16")]
        *axes, precisions = column.grid
        return [
            (self.of_sizes(members, batch, *widths), name)
            for members, batch, widths in product(*axes)
            for name in precisions
        ]
