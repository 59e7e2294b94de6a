"""Layers of members with different numbers of rows: `ragged_linear` against a loop, padding and grouped_mm.

Rows are the features of a layer before, so they need a gradient.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import RaggedCase

from ..workloads import RAGGED_WORKLOADS
from .backends import every_backend
from .base import LOOP, Contestant, NotApplicableError, Problem, Product, Suite
from .grouped_linear import from_function, separate

MORE_WORKLOADS = (
    RaggedCase(8, 2048, 64, 64, activation="gelu"),
    RaggedCase(100, 3200, 64, 64, activation="relu"),
    RaggedCase(50, 100, 256, 256),
    RaggedCase(8, 1024, 256, 256, one_member=True),
)
PADDED = "padded baddbmm"


def _sizes(problem: Problem) -> list[int]:
    return [b - a for a, b in pairwise(problem.workload.ends())]


def _member_of_rows(problem: Problem) -> Tensor:
    sizes = torch.tensor(_sizes(problem), device=problem.device)
    return torch.arange(len(sizes), device=problem.device).repeat_interleave(sizes)


def loop(problem: Problem) -> Contestant:
    """One member after the other, on a list of layers."""
    sizes, activation = _sizes(problem), ACTIVATIONS[problem.workload.activation].apply

    def function(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return torch.cat([activation(F.linear(*member)) for member in zip(x.split(sizes), weights, biases)])

    return separate(problem, LOOP, function)


def padded(problem: Problem) -> Contestant:
    """Every member has as many rows as the largest."""
    ends, activation = problem.workload.ends(), ACTIVATIONS[problem.workload.activation].apply
    member, most = _member_of_rows(problem), max(_sizes(problem))
    place = torch.arange(len(member), device=problem.device) - torch.tensor(ends, device=problem.device)[member]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.new_zeros(len(weight), most, x.shape[1]).index_put((member, place), x)
        return activation(torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)[member, place])

    return from_function(problem, PADDED, function)


def grouped_mm(problem: Problem) -> Contestant:
    if not hasattr(F, "grouped_mm"):
        raise NotApplicableError(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    activation, member = ACTIVATIONS[problem.workload.activation].apply, _member_of_rows(problem)
    ends = torch.tensor(problem.workload.ends()[1:], dtype=torch.int32, device=problem.device)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # grouped_mm takes no bias
        return activation(F.grouped_mm(x, weight.mT, offs=ends) + bias[member])

    return from_function(problem, "grouped_mm", function)


def ours(problem: Problem) -> list[Contestant]:
    options = {**problem.workload.options(), "offsets": problem.workload.options()["offsets"].to(problem.device)}
    return every_backend("ragged_linear", problem, (), from_function, options)


def products(case: RaggedCase) -> list[Product]:
    return [Product(case.batch, case.inputs, case.outputs, True)]


SUITE = Suite(
    name="ragged",
    title="Members of different sizes: ragged_linear",
    workloads=RAGGED_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, PADDED: padded, "grouped_mm": grouped_mm},
    ours=ours,
    products=products,
)
