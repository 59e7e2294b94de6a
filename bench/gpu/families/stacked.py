"""The stacked form, a weight for each member: `grouped_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import LinearCase

from ...contestants import Contestant, Problem, grouped_linear
from ...contestants.base import LOOP, PER_MEMBER, limit_per_member
from ..measured import Layer, Line
from .base import COMPUTE_GRID, LAUNCH_GRID, MEMORY_GRID, Column, Family

KERNELS_FORWARD, KERNELS_BACKWARD = 1, 2
OF_E_TIMES_LOOP, FROM_MEMBERS = 0.8, 10
EAGER_PEER, GRAPHED_PEER = 2.0, 1.3
COPY_BANDWIDTH = 0.85
GROUPED_MM_AT_ONE_ROW = 3.0
CUBLAS_PER_MEMBER = 0.95


def launch_goals(layer: Layer) -> Iterator[Line]:
    eager, graphed, members = layer.eager, layer.graphed, layer.case["members"]
    yield from layer.kernels(KERNELS_FORWARD, KERNELS_BACKWARD)
    if members >= FROM_MEMBERS:
        yield layer.over("loop / ours", OF_E_TIMES_LOOP * members, [eager.entry(LOOP)], eager)
    yield layer.over("best eager peer / ours", EAGER_PEER, layer.peers(eager, compiled=False), eager)
    yield layer.over("best graphed peer / ours", GRAPHED_PEER, layer.peers(graphed), graphed)
    yield from layer.host_times("baddbmm")


def memory_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield from layer.bandwidths(COPY_BANDWIDTH)
    if layer.case["batch"] == 1:
        for measure in ("forward", "total"):
            name = "forward + backward" if measure == "total" else measure
            grouped = [row.entry("grouped_mm")]
            yield layer.over(f"grouped_mm / ours, {name}", GROUPED_MM_AT_ONE_ROW, grouped, row, measure)
    yield layer.over("best peer / ours", None, layer.peers(row), row)


def compute_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield layer.over("mm per member / ours", CUBLAS_PER_MEMBER, [row.entry(PER_MEMBER)], row)
    yield layer.of_gemm_rate()
    yield layer.over("best peer / ours", None, layer.peers(row), row)


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
    launch_goals,
    LAUNCH_GRID,
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
    memory_goals,
    MEMORY_GRID,
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
    compute_goals,
    COMPUTE_GRID,
    cold=True,
)


def bmm_then_bias(problem: Problem) -> Contestant:
    """Bias and activation out of place, after the product: a kernel each."""
    activation = ACTIVATIONS[problem.workload.activation].apply

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.expand(len(weight), *x.shape) if x.dim() == 2 else x
        return activation(torch.bmm(rows, weight.mT) + bias.unsqueeze(1))

    return grouped_linear.from_function(problem, "bmm + bias", function)


def moved_bytes(case: LinearCase, dtype: torch.dtype) -> tuple[int, int]:
    """Each operand read once, each result written once."""
    weight, bias = case.members * case.outputs * case.inputs, case.members * case.outputs
    x = case.batch * case.inputs * (1 if case.shared else case.members)
    y = case.members * case.batch * case.outputs
    saved = y if case.activation in ("gelu", "silu") else 0  # forward writes z as well
    reads_saved = y if case.activation else 0
    forward = x + weight + bias + y + saved
    backward = y + reads_saved + x + weight + bias  # reads g, what was saved, x; writes dW, db
    backward += 0 if case.shared else weight + x  # dx: reads W, writes dx
    return forward * dtype.itemsize, backward * dtype.itemsize


def bounds(problem: Problem) -> list[Contestant]:
    case, dtype, device = problem
    return [limit_per_member(grouped_linear.products(case), case.members, dtype, device)]


FAMILY = Family(
    name="stacked",
    op="grouped_linear",
    columns=(LAUNCH, MEMORY, COMPUTE),
    suite=replace(grouped_linear.SUITE, peers={**grouped_linear.SUITE.peers, "bmm + bias": bmm_then_bias}),
    tiny=LinearCase(2, 4, 8, 8, activation="relu"),
    sizes=grouped_linear.sizes,
    of_sizes=lambda *sizes: LinearCase(*sizes, activation="relu"),
    options=lambda case: {"activation": case.activation},
    from_function=grouped_linear.from_function,
    moved_bytes=moved_bytes,
    bounds=bounds,
)
