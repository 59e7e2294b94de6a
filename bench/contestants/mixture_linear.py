"""Layers of mixed weights: `mixture_linear` against weights synthesized and multiplied.

The limit is the members' products, and a copy of as many bytes as the templates read twice and their gradient written.
Where rows are shared by more members than there are templates, less suffices: products of the templates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels import mixture_linear
from effens_kernels.testing import MixtureCase

from ..workloads import MIXTURE_WORKLOADS
from .base import LOOP, OURS, Contestant, Problem, Product, Suite, copy_limit, limit, one_after_the_other

MORE_WORKLOADS = (
    MixtureCase(8, 16, 512, 512, templates=16),
    MixtureCase(4, 256, 1024, 1024, templates=5),
    MixtureCase(32, 256, 64, 64, templates=4),
    MixtureCase(10, 1, 256, 256, templates=4),
    MixtureCase(10, 32, 256, 256, templates=8),
)
SYNTHESIS = "synthesis + bmm"
OUTPUTS = "outputs + einsum"
NAMES = ("x", "coefficients", "templates", "bias")


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, ...]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def from_function(problem: Problem, name: str, function: Callable[..., Tensor], **labels: Any) -> Contestant:
    """function(x, coefficients, templates, bias) on the problem's values; shared rows are data, without a gradient."""
    tensors = [t.clone().requires_grad_() for t in _values(problem)]
    tensors[0].requires_grad_(not problem.workload.shared)
    leaves = {name: t for name, t in zip(NAMES, tensors) if t.requires_grad}
    return Contestant(
        name,
        function,
        tuple(tensors),
        list(leaves.values()),
        lambda: {name: leaf.grad for name, leaf in leaves.items()},
        **labels,
    )


def loop(problem: Problem) -> Contestant:
    """One member after the other."""

    def function(x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor) -> Tensor:
        weights = [(member.view(-1, 1, 1) * templates).sum(0) for member in coefficients]
        rows = [x] * len(weights) if x.dim() == 2 else x
        return torch.stack([F.linear(*member) for member in zip(rows, weights, bias)])

    return from_function(problem, LOOP, function)


def synthesis(problem: Problem) -> Contestant:
    """All weights by one product, then one batched product."""

    def function(x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor) -> Tensor:
        weight = torch.mm(coefficients, templates.flatten(1)).unflatten(1, templates.shape[1:])
        rows = x.expand(len(weight), *x.shape) if x.dim() == 2 else x
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)

    return from_function(problem, SYNTHESIS, function)


def mixed_outputs(problem: Problem) -> Contestant:
    """No weight of a member: one product of all templates, mixed by another."""

    def function(x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor) -> Tensor:
        outputs = F.linear(x, templates.flatten(0, 1)).unflatten(-1, templates.shape[:2])
        mixed = "et,bto->ebo" if x.dim() == 2 else "et,ebto->ebo"
        return torch.einsum(mixed, coefficients, outputs) + bias.unsqueeze(1)

    return from_function(problem, OUTPUTS, function)


def ours(problem: Problem) -> list[Contestant]:
    return [from_function(problem, OURS, mixture_linear, kind="ours")]


def sizes(case: MixtureCase) -> tuple[int, int, int, int]:
    return case.members, case.batch, case.inputs, case.outputs


def products(case: MixtureCase) -> list[Product]:
    return [Product(case.members * case.batch, case.inputs, case.outputs, not case.shared)]


def plain(problem: Problem) -> Contestant:
    case, dtype, device = problem
    templates = case.templates * case.outputs * case.inputs * dtype.itemsize
    return one_after_the_other(limit(products(case), dtype, device), copy_limit(templates, 2 * templates, device))


SUITE = Suite(
    name="mixture",
    title="Layers of mixed weights: mixture_linear",
    workloads=MIXTURE_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, SYNTHESIS: synthesis, OUTPUTS: mixed_outputs},
    ours=ours,
    products=products,
    plain=plain,
)
