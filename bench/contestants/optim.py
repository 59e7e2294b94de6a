"""A step of an optimizer on E models: hyperparameters of each member, against E optimizers of PyTorch.

The limit is a copy of the bytes that must move: parameters, gradients and states are read, parameters and states are
written.  A step is a contestant's forward pass, and its backward pass is nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from effens_kernels.optim import EnsembleAdamW, EnsembleSGD

from .base import LOOP, OURS, Contestant, Problem, Suite, copy_limit

# Equal for all members, so that one optimizer of PyTorch on stacked parameters computes the same.
OPTIONS = {"adamw": {"lr": 1e-3, "weight_decay": 1e-2}, "sgd": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}}
THEIRS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
STATES = {"adamw": 2, "sgd": 1}
STACKED = "torch fused, stacked"


@dataclass(frozen=True)
class StepWorkload:
    """E perceptrons of these widths, or E networks of so many 3 x 3 convolutions of so many channels."""

    kind: str
    members: int
    widths: tuple[int, ...] = ()
    layers: int = 0
    channels: int = 0

    def __str__(self) -> str:
        model = "-".join(map(str, self.widths)) if self.widths else f"{self.layers}conv{self.channels}"
        return f"{self.kind}-E{self.members}-{model}"

    def shapes(self) -> list[tuple[int, ...]]:
        """Of a member's parameters; a convolution has the two of its normalization besides."""
        if self.widths:
            return [shape for i, o in zip(self.widths, self.widths[1:]) for shape in ((o, i), (o,))]
        return [(self.channels, self.channels, 3, 3), (self.channels,), (self.channels,)] * self.layers

    @property
    def numbers(self) -> int:
        return self.members * sum(map(prod, self.shapes()))


WORKLOADS = (
    StepWorkload("adamw", 10, (8, 64, 64, 64, 20)),
    StepWorkload("adamw", 5, (17, 256, 256, 256, 60)),
    StepWorkload("adamw", 4, layers=12, channels=64),
    StepWorkload("adamw", 4, layers=12, channels=160),
    StepWorkload("sgd", 10, (8, 64, 64, 64, 20)),
    StepWorkload("sgd", 4, layers=12, channels=160),
)


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Random parameters and gradients, stacked."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(problem.workload.members, *shape) for shape in problem.workload.shapes()]

    def normal() -> list[Tensor]:
        return [torch.randn(s, generator=generator).to(problem.device, problem.dtype) for s in shapes]

    return normal(), normal()


def _parameters(problem: Problem) -> list[nn.Parameter]:
    params = [nn.Parameter(t.clone()) for t in _values(problem)[0]]
    for p, g in zip(params, _values(problem)[1]):
        p.grad = g.clone()
    return params


def _contestant(
    name: str, step: Callable[[], object], results: Callable[[], list[Tensor]], **labels: str
) -> Contestant:
    first = results()[0].detach().flatten()[:1].clone()

    def function() -> Tensor:
        step()
        return first

    def updated() -> dict[str, Tensor]:
        return {f"step {n}": t.detach() for n, t in enumerate(results())}

    return Contestant(name, function, (), (), updated, backward=lambda *_: None, **labels)


def separate(problem: Problem, name: str, **how: bool) -> Contestant:
    """E models, each with an optimizer of its own."""
    kind = problem.workload.kind
    models = []
    for e in range(problem.workload.members):
        models.append([nn.Parameter(t[e].clone()) for t in _values(problem)[0]])
        for p, g in zip(models[-1], _values(problem)[1]):
            p.grad = g[e].clone()
    optimizers = [THEIRS[kind](params, **OPTIONS[kind], **how) for params in models]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return _contestant(name, step, lambda: [torch.stack(each) for each in zip(*models)])


def stacked(problem: Problem) -> Contestant:
    """What no member's own hyperparameters allow: PyTorch's fastest step, on the stacked parameters."""
    params, kind = _parameters(problem), problem.workload.kind
    optimizer = THEIRS[kind](params, **OPTIONS[kind], fused=True)
    return _contestant(STACKED, optimizer.step, lambda: params, kind="bound")


def ours(problem: Problem) -> list[Contestant]:
    params, kind, members = _parameters(problem), problem.workload.kind, problem.workload.members
    options = {name: [value] * members for name, value in OPTIONS[kind].items()}
    optimizer = {"adamw": EnsembleAdamW, "sgd": EnsembleSGD}[kind](params, **options)
    return [_contestant(OURS, optimizer.step, lambda: params, kind="ours")]


def moved_bytes(workload: StepWorkload, dtype: torch.dtype) -> int:
    return workload.numbers * dtype.itemsize * (3 + 2 * STATES[workload.kind])


SUITE = Suite(
    name="optim",
    title="A step of an optimizer: EnsembleAdamW, EnsembleSGD",
    workloads=WORKLOADS,
    peers={
        LOOP: lambda problem: separate(problem, LOOP),
        "foreach": lambda problem: separate(problem, "foreach", foreach=True),
        "fused": lambda problem: separate(problem, "fused", fused=True),
        STACKED: stacked,
    },
    ours=ours,
    products=lambda workload: [],
    plain=lambda problem: copy_limit(moved_bytes(problem.workload, problem.dtype), 0, problem.device),
    compiles=False,
)
