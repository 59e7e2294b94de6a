"""Whole perceptrons of a member each: `ensemble_mlp`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from ...contestants import ensemble_mlp
from ...contestants.base import COMPILED, LOOP
from ...contestants.ensemble_mlp import CHAIN, MLPWorkload
from ..measured import Layer, Line
from .base import Column, Family

KERNELS_FORWARD, KERNELS_BACKWARD = 1, 2
EAGER, GRAPHED_CHAIN = 10.0, 2.0
ROOFLINE = 0.5


def launch_goals(layer: Layer) -> Iterator[Line]:
    eager, graphed = layer.eager, layer.graphed
    yield from layer.kernels(KERNELS_FORWARD, KERNELS_BACKWARD)
    yield layer.over("graphed chain / ours", GRAPHED_CHAIN, [graphed.entry(CHAIN)], graphed)
    yield layer.over("eager loop / ours", EAGER, [eager.entry(LOOP)], eager)
    yield layer.over("best eager peer / ours", None, layer.peers(eager, compiled=False), eager)
    yield layer.over("best graphed peer / ours", None, layer.peers(graphed), graphed)
    yield from layer.host_times(CHAIN)


def compute_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield of_roofline(layer)
    yield layer.over("torch.compile / ours", None, [row.entry(name) for name in COMPILED], row)
    yield layer.over("best peer / ours", None, layer.peers(row), row)


def of_roofline(layer: Layer) -> Line:
    """Forward, of what the measured rates of products and copies allow."""
    row = layer.of_device
    rate = layer.ceilings.get(row.dtype, {}).get("TFLOP/s")
    copy = layer.ceilings.get("copy", {}).get("TB/s")
    least = rate and copy and max(row.forward_flops / rate, layer.data["bytes"][0] / copy) * 1e-12
    return layer.line(
        "of the roofline, forward", ROOFLINE, lambda ours: least and least / ours.seconds("forward").median, row
    )


LAUNCH = Column(
    "launch",
    "Whole perceptrons, bound by launches",
    (
        (MLPWorkload(10, 256, (8, 64, 64, 64, 20)), ("float32", "bfloat16")),
        (MLPWorkload(10, 32, (64, 64, 64, 64, 1), "silu"), ("float32",)),
        (MLPWorkload(100, 256, (17, 64, 64, 64, 6)), ("float32", "bfloat16")),
        (MLPWorkload(5, 128, (17, 256, 256, 256, 6)), ("float32",)),
    ),
    launch_goals,
)
COMPUTE = Column(
    "compute",
    "Whole perceptrons of many rows",
    (
        (MLPWorkload(16, 4096, (64, 64, 64, 64, 64)), ("bfloat16", "tf32", "float32")),
        (MLPWorkload(16, 4096, (128, 128, 128, 128, 128)), ("bfloat16", "tf32")),
        (MLPWorkload(64, 2048, (64, 128, 128, 1), "gelu"), ("bfloat16",)),
    ),
    compute_goals,
    cold=True,
)


def moved_bytes(workload: MLPWorkload, dtype: torch.dtype) -> tuple[int, int]:
    """Each operand read once, each result written once; backward keeps its gradients between layers on the chip."""
    rows = workload.members * workload.batch
    parameters = workload.members * sum((inputs + 1) * outputs for inputs, outputs in pairwise(workload.widths))
    x, y = workload.batch * workload.widths[0], rows * workload.widths[-1]
    hidden = rows * sum(workload.widths[1:-1])
    z = hidden if workload.activation in ("gelu", "silu") else 0
    forward = x + parameters + hidden + z + y
    backward = y + x + hidden + z + parameters  # reads
    backward += parameters
    return forward * dtype.itemsize, backward * dtype.itemsize


def sizes(workload: MLPWorkload) -> tuple[int, int, int, int]:
    """E, B, multiply-adds of a row, 1: the choice of a backend does not depend on them."""
    return workload.members, workload.batch, sum(i * o for i, o in pairwise(workload.widths)), 1


FAMILY = Family(
    name="mlp",
    op="ensemble_mlp",
    columns=(LAUNCH, COMPUTE),
    suite=ensemble_mlp.SUITE,
    tiny=MLPWorkload(2, 4, (8, 8, 8)),
    sizes=sizes,
    options=ensemble_mlp.options,
    from_function=ensemble_mlp.from_function,
    moved_bytes=moved_bytes,
)
