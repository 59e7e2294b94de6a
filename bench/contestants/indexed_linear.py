"""Layers of which each group names its input and its weight: `indexed_linear` against a loop and gathered operands.

Inputs are the features of a layer before, of paths that share it, so they need a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import IndexedCase

from ..workloads import INDEXED_WORKLOADS
from .backends import every_backend
from .base import LOOP, Contestant, Problem, Product, Suite
from .grouped_linear import from_function, separate

MORE_WORKLOADS = (
    IndexedCase(4, 64, 64, 64, sources=16, groups=64, activation="gelu"),
    IndexedCase(32, 32, 64, 64, sources=32, groups=128),
    IndexedCase(4, 1, 256, 256, sources=8, groups=32),
    IndexedCase(64, 16, 256, 256, sources=1, groups=16, activation="relu"),
)
GATHER = "gather + baddbmm"


def _options(problem: Problem) -> dict[str, Tensor | str | None]:
    options = problem.workload.options()
    return {name: o.to(problem.device) if isinstance(o, Tensor) else o for name, o in options.items()}


def loop(problem: Problem) -> Contestant:
    """One group after the other, on a list of layers."""
    pairs, activation = list(zip(*problem.workload.numbers())), ACTIVATIONS[problem.workload.activation].apply

    def function(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        rows = x.unbind()
        return torch.stack([activation(F.linear(rows[p], weights[e], biases[e])) for p, e in pairs])

    return separate(problem, LOOP, function)


def gather(problem: Problem) -> Contestant:
    """Inputs and weights copied for each group, then one batched product."""
    options, activation = _options(problem), ACTIVATIONS[problem.workload.activation].apply
    x_index, weight_index = options["x_index"], options["weight_index"]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        biases = bias[weight_index].unsqueeze(1)
        return activation(torch.baddbmm(biases, x[x_index], weight[weight_index].mT))

    return from_function(problem, GATHER, function)


def ours(problem: Problem) -> list[Contestant]:
    return every_backend("indexed_linear", problem, (), from_function, _options(problem))


def products(case: IndexedCase) -> list[Product]:
    return [Product(case.groups * case.batch, case.inputs, case.outputs, True)]


SUITE = Suite(
    name="indexed",
    title="Layers by number: indexed_linear",
    workloads=INDEXED_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, GATHER: gather},
    ours=ours,
    products=products,
)
