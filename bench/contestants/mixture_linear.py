"""Layers of mixed weights: `mixture_linear` against weights synthesized and multiplied.

The limit is the members' products, and a copy of as many bytes as the templates read twice and their gradient written.
Where rows are shared by more members than there are templates, less suffices: products of the templates.  Mixing itself
is not in it; the second limit has its multiply-adds too, as a plain product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels import mixture_linear
from effens_kernels.testing import MIXTURE_WORKLOADS, MixtureCase

from .base import LOOP, OURS, Contestant, Problem, Product, Suite, copy_limit, limit, one_after_the_other

MORE_WORKLOADS = (
    MixtureCase(8, 16, 512, 512, templates=16),
    MixtureCase(4, 256, 1024, 1024, templates=5),
    MixtureCase(32, 256, 64, 64, templates=4),
    MixtureCase(10, 1, 256, 256, templates=4),
    MixtureCase(10, 32, 256, 256, templates=8),
)
WITH_MIXING = "limit with mixing"
NAMES = ("x", "coefficients", "templates", "bias")


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, ...]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def _contestant(name: str, problem: Problem, function: Callable[..., Tensor], kind: str = "peer") -> Contestant:
    """Rows that all members share are data and need no gradient."""
    tensors = [t.clone().requires_grad_() for t in _values(problem)]
    tensors[0].requires_grad_(not problem.workload.shared)
    leaves = {name: t for name, t in zip(NAMES, tensors) if t.requires_grad}
    return Contestant(
        name,
        function,
        tuple(tensors),
        list(leaves.values()),
        lambda: {name: leaf.grad for name, leaf in leaves.items()},
        kind,
    )


def loop(problem: Problem) -> Contestant:
    """One member after the other."""

    def function(x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor) -> Tensor:
        weights = [(member.view(-1, 1, 1) * templates).sum(0) for member in coefficients]
        rows = [x] * len(weights) if x.dim() == 2 else x
        return torch.stack([F.linear(*member) for member in zip(rows, weights, bias)])

    return _contestant(LOOP, problem, function)


def synthesis(problem: Problem) -> Contestant:
    """All weights by one product, then one batched product."""

    def function(x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor) -> Tensor:
        weight = torch.mm(coefficients, templates.flatten(1)).unflatten(1, templates.shape[1:])
        rows = x.expand(len(weight), *x.shape) if x.dim() == 2 else x
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)

    return _contestant("synthesis + bmm", problem, function)


def ours(problem: Problem) -> list[Contestant]:
    return [_contestant(OURS, problem, mixture_linear, "ours"), with_mixing(problem)]


def products(case: MixtureCase) -> list[Product]:
    return [Product(case.members * case.batch, case.inputs, case.outputs, not case.shared)]


def plain(problem: Problem) -> Contestant:
    case, dtype, device = problem
    templates = case.templates * case.outputs * case.inputs * dtype.itemsize
    return one_after_the_other(limit(products(case), dtype, device), copy_limit(templates, 2 * templates, device))


def with_mixing(problem: Problem) -> Contestant:
    """The limit, and as many multiply-adds as weights and both gradients of mixing take."""
    case, dtype, device = problem
    side = 512
    rows = -(-case.members * case.templates * case.outputs * case.inputs // side**2)
    mixing = limit([Product(rows, side, side, True)], dtype, device)
    return replace(one_after_the_other(plain(problem), mixing), name=WITH_MIXING, kind="bound")


SUITE = Suite(
    name="mixture",
    title="Layers of mixed weights: mixture_linear",
    workloads=MIXTURE_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, "synthesis + bmm": synthesis},
    ours=ours,
    products=products,
    plain=plain,
)
