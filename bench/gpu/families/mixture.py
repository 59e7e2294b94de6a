"""Layers of the mixed form: `mixture_linear`, by weights mixed of templates or by outputs mixed.

Dispatch takes one of these routes; each backend is measured on both, which is what its rule can be judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from effens_kernels import _dispatch
from effens_kernels.testing import LinearCase, MixtureCase

from ...contestants import Contestant, Problem, grouped_linear, mixture_linear
from ...contestants.mixture_linear import SYNTHESIS, sizes
from ...results import Entry, Row
from ..measured import Layer, Line
from ..routed import ROUTES, every_route, name_of
from .base import Column, Family

BADDBMM = "torch.baddbmm"
HOST_OVER_TORCH = 5.0  # microseconds
OVER_SYNTHESIS = 1.2
TO_FASTEST = 1.2


def launch_goals(layer: Layer) -> Iterator[Line]:
    eager, graphed = layer.eager, layer.graphed
    yield from layer.kernels(None, None)
    yield from layer.host_times(BADDBMM, HOST_OVER_TORCH)
    yield layer.over("best eager peer / ours", None, layer.peers(eager, compiled=False), eager)
    yield layer.over("best graphed peer / ours", None, layer.peers(graphed), graphed)
    yield layer.over(f"{SYNTHESIS} / ours, graphed", None, [graphed.entry(SYNTHESIS)], graphed)
    yield from routes(layer, eager, ", eager")
    yield from routes(layer, graphed, ", graphed")


def memory_goals(layer: Layer) -> Iterator[Line]:
    yield from layer.bandwidths(None, None)
    yield from device_goals(layer)


def compute_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield from device_goals(layer)
    yield layer.over(f"{BADDBMM} / ours", None, [row.entry(BADDBMM)], row)
    yield layer.of_gemm_rate()


def device_goals(layer: Layer) -> Iterator[Line]:
    """Kernels are worth choosing where they beat synthesis and a torch product; elsewhere there is nothing to beat."""
    row = layer.of_device
    delegated = row.ours is not None and row.ours.note == "backend reference"
    yield layer.over(f"{SYNTHESIS} / ours", None if delegated else OVER_SYNTHESIS, [row.entry(SYNTHESIS)], row)
    yield layer.over("best peer / ours", None, layer.peers(row), row)
    yield from routes(layer, row)


def routes(layer: Layer, row: Row, how: str = "") -> Iterator[Line]:
    """Which is faster on each backend, and what the automatic choice leaves of the fastest."""

    def seconds(backend: str) -> list[float]:
        entries = [row.entry(name_of(backend, route)) for route in ROUTES]
        return [entry.seconds().median for entry in entries if entry]

    def outputs_over_weights(ours: Entry) -> float | None:
        found = seconds(ours.note.removeprefix("backend "))
        return found[1] / found[0] if len(found) == 2 else None

    fastest = min((least for backend in _dispatch.BACKENDS for least in seconds(backend)), default=None)
    yield layer.line(f"outputs / weights{how}", None, outputs_over_weights, row)
    yield layer.line(
        f"ours / fastest route{how}",
        TO_FASTEST,
        lambda ours: fastest and ours.seconds().median / fastest,
        row,
        at_most=True,
    )


# No column has a grid: a table of measurements is by E, B, I and O, and what is fastest depends on T and on whether
# rows are shared.  Not in float16, whose range mixed outputs may leave.
LAUNCH = Column(
    "launch",
    "Mixed (layers), bound by launches",
    (
        (MixtureCase(4, 128, 64, 64, templates=4), ("float32", "bfloat16")),
        (MixtureCase(10, 32, 256, 256, templates=8), ("float32",)),
        (MixtureCase(32, 256, 64, 64, shared=True, templates=4), ("float32", "bfloat16")),
        (MixtureCase(10, 256, 8, 64, shared=True, templates=16), ("float32",)),
        (MixtureCase(100, 32, 64, 64, templates=16), ("float32",)),
    ),
    launch_goals,
)
# Few rows of templates of 128 MiB and more, so that no L2 holds them.
MEMORY = Column(
    "memory",
    "Mixed (layers), bound by memory",
    (
        (MixtureCase(8, 4, 4096, 4096, templates=4), ("bfloat16", "float32")),
        (MixtureCase(4, 32, 2048, 2048, templates=16), ("bfloat16",)),
        (MixtureCase(8, 8, 4096, 4096, shared=True, templates=4), ("bfloat16", "float32")),
        (MixtureCase(16, 8, 4096, 4096, shared=True, templates=4), ("bfloat16",)),
    ),
    memory_goals,
    cold=True,
    limit="copy",
)
# On both sides of where dispatch takes torch's products instead of the kernels.
COMPUTE = Column(
    "compute",
    "Mixed (layers), bound by arithmetic",
    (
        (MixtureCase(4, 4096, 4096, 4096, templates=4), ("bfloat16",)),
        (MixtureCase(8, 2048, 2048, 2048, shared=True, templates=4), ("bfloat16", "tf32")),
        (MixtureCase(4, 256, 1024, 1024, templates=5), ("bfloat16", "tf32", "float32")),
        (MixtureCase(32, 256, 1024, 1024, shared=True, templates=4), ("bfloat16",)),
    ),
    compute_goals,
    cold=True,
)


def members_products(problem: Problem) -> list[Contestant]:
    """What a torch op costs for members whose weights are there."""
    case = problem.workload
    stacked = LinearCase(*sizes(case), shared=case.shared)
    return [replace(grouped_linear.baddbmm(problem._replace(workload=stacked)), name=BADDBMM, kind="bound")]


def moved_bytes(case: MixtureCase, dtype: torch.dtype) -> tuple[int, int]:
    """Each operand read once, each result written once; no weight of a member has to be made."""
    members, batch, inputs, outputs = sizes(case)
    parameters = members * case.templates + case.templates * outputs * inputs
    bias = members * outputs
    x, y = batch * inputs * (1 if case.shared else members), members * batch * outputs
    forward = x + parameters + bias + y
    backward = y + x + parameters  # reads g, x, coefficients and templates
    backward += parameters + bias  # writes their gradients
    backward += 0 if case.shared else x  # dx
    return forward * dtype.itemsize, backward * dtype.itemsize


FAMILY = Family(
    name="mixture",
    op="mixture_linear",
    columns=(LAUNCH, MEMORY, COMPUTE),
    suite=replace(
        mixture_linear.SUITE,
        plain=None,  # products alone: a column bound by memory brings its own limit
    ),
    tiny=MixtureCase(2, 4, 8, 8, templates=3),
    sizes=sizes,
    options=lambda case: {},
    from_function=mixture_linear.from_function,
    moved_bytes=moved_bytes,
    bounds=members_products,
    variants=every_route,
)
