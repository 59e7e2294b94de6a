"""What the bench parts measure: the columns of the goals' table for the stacked form, each with its own bottleneck."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from effens_kernels.testing import LinearCase

TINY = LinearCase(2, 4, 8, 8, activation="relu")


@dataclass(frozen=True)
class Column:
    name: str
    title: str
    layers: tuple[tuple[LinearCase, tuple[str, ...]], ...]  # with precisions: a table row each
    buckets: tuple[tuple[tuple[int, ...], ...], ...]  # members, batches, (inputs, outputs)
    bucket_precisions: tuple[str, ...]
    cold: bool  # inputs are evicted from L2 before every step
    limit: str = "products"  # or "copy"

    def rows(self, rehearsal: bool) -> list[tuple[LinearCase, str]]:
        if rehearsal:
            return [(TINY, "float32")]
        return [(case, name) for case, names in self.layers for name in names]

    def sweep(self, rehearsal: bool) -> Iterator[tuple[LinearCase, str]]:
        if rehearsal:
            yield TINY, "bfloat16"
            return
        for members, batch, (inputs, outputs) in product(*self.buckets):
            for name in self.bucket_precisions:
                yield LinearCase(members, batch, inputs, outputs, activation="relu"), name


LAUNCH = Column(
    "launch",
    "Stacked, bound by launches",
    (
        (LinearCase(10, 256, 64, 64, activation="relu"), ("float32", "bfloat16")),
        (LinearCase(10, 32, 256, 256, activation="relu"), ("float32", "bfloat16")),
        (LinearCase(32, 128, 64, 64, activation="gelu"), ("float32",)),
        (LinearCase(10, 256, 8, 64, shared=True, activation="relu"), ("float32",)),
        (LinearCase(100, 32, 64, 64, activation="relu"), ("float32",)),
    ),
    ((8, 64), (32, 256), ((64, 64), (256, 256))),
    ("float32", "bfloat16"),
    cold=False,
)
# Weights of 128 MiB and more, so that no L2 holds them.
MEMORY = Column(
    "memory",
    "Stacked, bound by memory",
    (
        (LinearCase(64, 1, 2048, 1024), ("bfloat16", "float32")),
        (LinearCase(64, 16, 2048, 1024, activation="relu"), ("bfloat16",)),
        (LinearCase(1024, 8, 256, 256, activation="relu"), ("bfloat16", "float32")),
    ),
    ((16, 256), (1, 8, 64), ((512, 512), (1024, 1024))),
    ("float32", "bfloat16"),
    cold=True,
    limit="copy",
)
COMPUTE = Column(
    "compute",
    "Stacked, bound by arithmetic",
    (
        (LinearCase(4, 4096, 4096, 4096), ("bfloat16",)),
        (LinearCase(8, 2048, 2048, 2048, activation="relu"), ("bfloat16", "float16", "tf32")),
        (LinearCase(4, 1024, 1024, 1024), ("bfloat16", "tf32", "float32")),
    ),
    ((4, 32), (256, 1024), ((256, 256), (512, 512), (1024, 1024))),
    ("float32", "tf32", "bfloat16"),
    cold=True,
)
COLUMNS = {column.name: column for column in (LAUNCH, MEMORY, COMPUTE)}


def moved_bytes(case: LinearCase, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that forward and backward cannot avoid to move: each operand read once, each result written once."""
    weight, bias = case.members * case.outputs * case.inputs, case.members * case.outputs
    x = case.batch * case.inputs * (1 if case.shared else case.members)
    y = case.members * case.batch * case.outputs
    saved = y if case.activation in ("gelu", "silu") else 0  # forward writes z as well
    reads_saved = y if case.activation else 0
    forward = x + weight + bias + y + saved
    backward = y + reads_saved + x + weight + bias  # reads g, what was saved, x; writes dW, db
    backward += 0 if case.shared else weight + x  # dx: reads W, writes dx
    return forward * dtype.itemsize, backward * dtype.itemsize
