"""The shared form, one weight and two scales for each member: `rank1_linear` (BatchEnsemble)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...contestants import batchensemble
from ...contestants.base import COMPILED, LOOP
from ...workloads import BatchEnsembleWorkload
from ..measured import Layer, Line
from .base import COMPUTE_GRID, LAUNCH_GRID, MEMORY_GRID, Column, Family

KERNELS_FORWARD, KERNELS_BACKWARD = 1, 3
EAGER_PEER = 3.0
COPY_BANDWIDTH = 0.85
TO_ONE_PRODUCT, TO_TWO_PRODUCTS = 1.08, 1.12
COMPILED_PEER = 1.3


def launch_goals(layer: Layer) -> Iterator[Line]:
    eager, graphed = layer.eager, layer.graphed
    yield from layer.kernels(KERNELS_FORWARD, KERNELS_BACKWARD)
    yield layer.over("best eager peer / ours", EAGER_PEER, layer.peers(eager, compiled=False), eager)
    yield layer.over("loop / ours", None, [eager.entry(LOOP)], eager)
    yield layer.over("best graphed peer / ours", None, layer.peers(graphed), graphed)
    yield from layer.host_times("broadcast")


def memory_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield from layer.bandwidths(COPY_BANDWIDTH, COPY_BANDWIDTH)
    yield layer.over("best peer / ours", None, layer.peers(row), row)


def compute_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield layer.to_limit("ours / one product, forward", TO_ONE_PRODUCT, row, "forward")
    yield layer.to_limit("ours / two products, backward", TO_TWO_PRODUCTS, row, "backward")
    yield layer.over("torch.compile / ours", COMPILED_PEER, [row.entry(name) for name in COMPILED], row)
    yield layer.of_gemm_rate()
    yield layer.over("best peer / ours", None, layer.peers(row), row)


def one_layer(members: int, batch: int, inputs: int, outputs: int, data: bool = False) -> BatchEnsembleWorkload:
    """An inner layer, or the first one of a model, whose x is `data` that all members see and needs no gradient."""
    return BatchEnsembleWorkload(members, batch, (inputs, outputs), model=data)


LAUNCH = Column(
    "launch",
    "Shared (BatchEnsemble), bound by launches",
    (
        (one_layer(4, 128, 64, 64), ("float32", "bfloat16")),
        (one_layer(10, 32, 256, 256), ("float32", "bfloat16")),
        (one_layer(32, 256, 64, 64), ("float32", "bfloat16")),
        (one_layer(32, 256, 64, 256, data=True), ("float32",)),
        (one_layer(100, 32, 64, 64), ("float32",)),
    ),
    launch_goals,
    LAUNCH_GRID,
)
# Few rows of a weight of 128 MiB and more, which no L2 holds, for few members, whose weights peers write out.  And many
# rows of narrow features, in precisions whose products are fast enough for memory to be the bottleneck.
MEMORY = Column(
    "memory",
    "Shared (BatchEnsemble), bound by memory",
    (
        (one_layer(4, 1, 8192, 8192), ("bfloat16", "float32")),
        (one_layer(8, 4, 8192, 8192), ("bfloat16",)),
        (one_layer(32, 16384, 64, 64), ("bfloat16",)),
        (one_layer(32, 8192, 64, 64), ("tf32",)),
    ),
    memory_goals,
    MEMORY_GRID,
    cold=True,
    limit="copy",
)
COMPUTE = Column(
    "compute",
    "Shared (BatchEnsemble), bound by arithmetic",
    (
        (one_layer(4, 4096, 4096, 4096), ("bfloat16",)),
        (one_layer(8, 2048, 2048, 2048), ("bfloat16", "float16", "tf32")),
        (one_layer(4, 1024, 1024, 1024), ("bfloat16", "tf32", "float32")),
    ),
    compute_goals,
    COMPUTE_GRID,
    cold=True,
)


def moved_bytes(workload: BatchEnsembleWorkload, dtype: torch.dtype) -> tuple[int, int]:
    """Each operand read once, each result written once."""
    members, batch, inputs, outputs = sizes(workload)
    weight, scales, bias = outputs * inputs, members * (inputs + outputs), members * outputs
    x, y = batch * inputs * (1 if workload.model else members), members * batch * outputs
    forward = x + weight + scales + bias + y
    backward = y + x + weight + scales  # reads g, x, W, r and s
    backward += weight + scales + bias  # writes dW, dr, ds, db
    backward += 0 if workload.model else x  # dx
    return forward * dtype.itemsize, backward * dtype.itemsize


def sizes(workload: BatchEnsembleWorkload) -> tuple[int, int, int, int]:
    return workload.members, workload.batch, *workload.widths


FAMILY = Family(
    name="shared",
    op="rank1_linear",
    columns=(LAUNCH, MEMORY, COMPUTE),
    suite=batchensemble.SUITE,
    tiny=one_layer(2, 4, 8, 8),
    sizes=sizes,
    of_sizes=one_layer,
    options=lambda workload: {},
    from_function=batchensemble.from_function,
    moved_bytes=moved_bytes,
)
