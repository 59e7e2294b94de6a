"""Convolutions of mixed weights: `mixture_conv2d` against weights synthesized, then convolved in one way or another.

The limit is one plain convolution of the images of all members, and a copy of as many bytes as the templates read twice
and their gradient written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels import mixture_conv2d

from ..workloads import MIXTURE_CONV_WORKLOADS, MixtureConvWorkload
from .base import LOOP, OURS, Contestant, Problem, Suite, copy_limit, one_after_the_other
from .rank1_conv2d import plain_convolution, products

MORE_WORKLOADS = (
    MixtureConvWorkload(4, 32, 3, 16, 32, shared=True, templates=4),
    MixtureConvWorkload(4, 32, 64, 64, 32, templates=4),
    MixtureConvWorkload(4, 8, 160, 160, 32, templates=5),
    MixtureConvWorkload(4, 32, 320, 320, 8, templates=5),
    MixtureConvWorkload(4, 16, 160, 320, 16, stride=2, templates=5),
    MixtureConvWorkload(4, 16, 160, 320, 16, kernel=1, stride=2, templates=5),
    MixtureConvWorkload(4, 32, 64, 64, 16, kernel=1, templates=4),
    MixtureConvWorkload(4, 16, 64, 64, 16, channels_last=True, templates=5),
)
NAMES = ("x", "coefficients", "templates", "bias")
Convolution = Callable[..., Tensor]


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, ...]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def _contestant(name: str, problem: Problem, function: Convolution, kind: str = "peer") -> Contestant:
    """Images that all members see are data and need no gradient."""
    workload = problem.workload
    tensors = [t.clone().requires_grad_() for t in _values(problem)]
    tensors[0].requires_grad_(not workload.shared)
    leaves = {name: t for name, t in zip(NAMES, tensors) if t.requires_grad}
    return Contestant(
        name,
        lambda *inputs: function(*inputs, workload.stride, workload.kernel // 2),
        tuple(tensors),
        list(leaves.values()),
        lambda: {name: leaf.grad for name, leaf in leaves.items()},
        kind,
    )


def _synthesized(coefficients: Tensor, templates: Tensor) -> Tensor:
    """All weights by one product, [E, O, C, kh, kw]."""
    return torch.mm(coefficients, templates.flatten(1)).unflatten(1, templates.shape[1:])


def _of_members(x: Tensor, weights: list[Tensor] | Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    images = [x] * len(weights) if x.dim() == 4 else x
    return torch.stack([F.conv2d(*member, stride, padding) for member in zip(images, weights, bias)])


def loop(problem: Problem) -> Contestant:
    """One member after the other, its weight as the equation reads."""

    def function(x, coefficients, templates, bias, stride, padding):
        weights = [(member.view(-1, 1, 1, 1, 1) * templates).sum(0) for member in coefficients]
        return _of_members(x, weights, bias, stride, padding)

    return _contestant(LOOP, problem, function)


def synthesis_and_loop(problem: Problem) -> Contestant:
    def function(x, coefficients, templates, bias, stride, padding):
        return _of_members(x, _synthesized(coefficients, templates), bias, stride, padding)

    return _contestant("synthesis + loop", problem, function)


def synthesis_and_groups(problem: Problem) -> Contestant:
    """All members as groups of one convolution."""

    def function(x, coefficients, templates, bias, stride, padding):
        members = len(coefficients)
        weight = _synthesized(coefficients, templates).flatten(0, 1)
        images = x.repeat(1, members, 1, 1) if x.dim() == 4 else x.transpose(0, 1).flatten(1, 2)
        y = F.conv2d(images, weight, bias.flatten(), stride, padding, groups=members)
        return y.unflatten(1, (members, -1)).transpose(0, 1)

    return _contestant("synthesis + groups", problem, function)


def ours(problem: Problem) -> list[Contestant]:
    return [_contestant(OURS, problem, mixture_conv2d, "ours")]


def plain(problem: Problem) -> Contestant:
    x, _, templates, bias = _values(problem)
    return one_after_the_other(
        plain_convolution(problem.workload, x, templates[0], bias[0]),
        copy_limit(templates.nbytes, 2 * templates.nbytes, problem.device),
    )


SUITE = Suite(
    name="mixture_conv",
    title="Convolutions of mixed weights: mixture_conv2d",
    workloads=MIXTURE_CONV_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, "synthesis + loop": synthesis_and_loop, "synthesis + groups": synthesis_and_groups},
    ours=ours,
    products=products,
    plain=plain,
)
