"""Template mixing: `mix_templates` against what users write; the limit is a copy of the bytes that must move.

Forward reads templates and writes weights; backward reads templates and the weights' gradient, and writes the
templates' gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from effens_kernels import mix_templates
from effens_kernels.testing import MixCase

from ..workloads import MIX_WORKLOADS
from .base import OURS, Contestant, Problem, Product, Suite, copy_limit

MORE_WORKLOADS = (
    MixCase((4,), 5, (160, 160, 3, 3)),
    MixCase((4,), 3, (64, 64)),
    MixCase((64,), 64, (128, 256)),
    MixCase((16,), 64, (256, 256)),
)


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def from_function(problem: Problem, name: str, function: Callable[..., Tensor], **labels: str) -> Contestant:
    """function(coefficients, templates) on the problem's values."""
    coefficients, templates = (t.clone().requires_grad_() for t in _values(problem))
    return Contestant(
        name,
        function,
        (coefficients, templates),
        [coefficients, templates],
        lambda: {"coefficients": coefficients.grad, "templates": templates.grad},
        **labels,
    )


def loop(problem: Problem) -> Contestant:
    """A weighted sum for each member, as the equation reads."""

    def function(coefficients: Tensor, templates: Tensor) -> Tensor:
        axes = (1,) * (templates.dim() - 1)
        return torch.stack([(member.view(-1, *axes) * templates).sum(0) for member in coefficients])

    return from_function(problem, "sum per member", function)


def einsum(problem: Problem) -> Contestant:
    return from_function(problem, "einsum", lambda c, t: torch.einsum("et,t...->e...", c, t))


def mm(problem: Problem) -> Contestant:
    return from_function(problem, "mm", lambda c, t: torch.mm(c, t.flatten(1)).unflatten(1, t.shape[1:]))


def ours(problem: Problem) -> list[Contestant]:
    return [from_function(problem, OURS, mix_templates, kind="ours")]


def sizes(case: MixCase) -> tuple[int, int, int]:
    return case.rows, case.templates, case.columns


def moved_bytes(case: MixCase, dtype: torch.dtype) -> tuple[int, int]:
    """That cannot be avoided: forward, backward."""
    column = case.columns * dtype.itemsize
    return (case.templates + case.rows) * column, (2 * case.templates + case.rows) * column


SUITE = Suite(
    name="mixing",
    title="Template mixing: mix_templates",
    workloads=MIX_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={"sum per member": loop, "einsum": einsum, "mm": mm},
    ours=ours,
    products=lambda case: [Product(case.rows, case.templates, case.columns, True)],
    plain=lambda problem: copy_limit(*moved_bytes(problem.workload, problem.dtype), problem.device),
)
