"""The mixed form, weights as combinations of templates: `mix_templates`.

What reads the weights is another family's matter: the layers of `mixture`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from effens_kernels.testing import MixCase

from ...contestants import Contestant, Problem, mix_templates
from ..measured import Layer, Line
from .base import Column, Family

MM = "torch.mm"
HOST_OVER_TORCH = 5.0  # microseconds
COPY_FORWARD, COPY_BACKWARD = 0.90, 0.85


def launch_goals(layer: Layer) -> Iterator[Line]:
    eager, graphed = layer.eager, layer.graphed
    yield from layer.kernels(None, None)
    yield from layer.host_times(MM, HOST_OVER_TORCH)
    yield layer.over("best eager peer / ours", None, layer.peers(eager, compiled=False), eager)
    yield layer.over("best graphed peer / ours", None, layer.peers(graphed), graphed)


def memory_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield from layer.bandwidths(COPY_FORWARD, COPY_BACKWARD)
    yield layer.over("best peer / ours", None, layer.peers(row), row)


def compute_goals(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    for measure in ("forward", "backward"):
        yield layer.over(f"{MM} / ours, {measure}", None, [row.entry(MM)], row, measure)
    yield layer.of_gemm_rate()
    yield layer.over("best peer / ours", None, layer.peers(row), row)


# No column has a grid: a table of measurements is by E, B, I and O, and rules choose from M, T and N.
LAUNCH = Column(
    "launch",
    "Mixed (templates), bound by launches",
    (
        (MixCase((4,), 5, (160, 160, 3, 3)), ("float32", "bfloat16")),
        (MixCase((10,), 8, (256, 256)), ("float32", "bfloat16")),
        (MixCase((16,), 3, (64, 64, 3, 3)), ("float32",)),  # 4 members of 4 layers
        (MixCase((32,), 16, (64, 64)), ("float32",)),
        (MixCase((4,), 3, (64, 64)), ("float32",)),
    ),
    launch_goals,
)
# Templates and weights of 128 MiB and more, so that no L2 holds them, and few FLOPs for each of their bytes.
MEMORY = Column(
    "memory",
    "Mixed (templates), bound by memory",
    (
        (MixCase((4,), 5, (1280, 1280, 3, 3)), ("bfloat16", "float32")),
        (MixCase((16,), 5, (640, 640, 3, 3)), ("float32",)),
        (MixCase((8,), 16, (2048, 2048)), ("bfloat16", "float16", "float32")),
        (MixCase((10,), 8, (2048, 2048)), ("bfloat16",)),
        (MixCase((32,), 16, (2048, 2048)), ("float32",)),
    ),
    memory_goals,
    cold=True,
    limit="copy",
)
# On both sides of where dispatch takes torch's product instead of the kernels, which do not use tensor cores.
COMPUTE = Column(
    "compute",
    "Mixed (templates), bound by arithmetic",
    (
        (MixCase((32,), 32, (1024, 1024)), ("bfloat16", "float32")),
        (MixCase((64,), 64, (1024, 1024)), ("bfloat16", "tf32", "float32")),
        (MixCase((256,), 256, (512, 512)), ("bfloat16", "float32")),
    ),
    compute_goals,
    cold=True,
)


def one_mm(problem: Problem) -> list[Contestant]:
    """What a torch op costs for the same: a product of matrices, without the views that bring weights into shape."""
    case = problem.workload
    matrices = replace(case, shape=(case.columns,))
    return [mix_templates.from_function(problem._replace(workload=matrices), MM, torch.mm, kind="bound")]


FAMILY = Family(
    name="mixed",
    op="mix_templates",
    columns=(LAUNCH, MEMORY, COMPUTE),
    suite=replace(mix_templates.SUITE, plain=None),  # products alone: a column bound by memory brings its own limit
    tiny=MixCase((2,), 3, (4, 5)),
    sizes=mix_templates.sizes,
    options=lambda case: {},
    from_function=mix_templates.from_function,
    moved_bytes=mix_templates.moved_bytes,
    bounds=one_mm,
)
