"""Predictions of ensembles: `ensemble_predict` against what users write; the limit is a copy of the unavoidable bytes.

Forward reads logits and writes mean probabilities and variances; backward reads logits, mean probabilities and the
gradients of both results, and writes the logits' gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from effens_kernels import ensemble_predict
from effens_kernels.testing import PREDICT_WORKLOADS, PredictCase

from .base import OURS, Contestant, Problem, Suite, copy_limit

MORE_WORKLOADS = (
    PredictCase(5, 4096, 2),
    PredictCase(100, 1024, 10),
    PredictCase(8, 64, 32000),
)


@lru_cache(maxsize=1)
def _values(problem: Problem) -> Tensor:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def from_function(problem: Problem, name: str, function: Callable[[Tensor], Tensor], **labels: str) -> Contestant:
    logits = _values(problem).clone().requires_grad_()
    return Contestant(name, function, (logits,), [logits], lambda: {"logits": logits.grad}, **labels)


def joined(*results: Tensor) -> Tensor:
    """All results as one, [B, 2 C + 3]: a contestant has one output."""
    mean, variance, *rows = results
    return torch.cat([mean, variance, torch.stack(rows, -1)], -1)


def softmax(problem: Problem) -> Contestant:
    """As in tutorials: probabilities, their mean and spread, and p log p of either."""

    def function(logits: Tensor) -> Tensor:
        p = logits.float().softmax(-1)
        mean = p.mean(0)
        entropy = -(mean * (mean + 1e-12).log()).sum(-1)
        expected = -(p * (p + 1e-12).log()).sum(-1).mean(0)
        return joined(mean, p.var(0, unbiased=False), entropy, expected, entropy - expected)

    return from_function(problem, "softmax", function)


def log_softmax(problem: Problem) -> Contestant:
    """Without a logarithm of each probability."""

    def function(logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        mean = p.mean(0)
        entropy, expected = torch.special.entr(mean).sum(-1), -(p * log_p).sum(-1).mean(0)
        return joined(mean, p.var(0, unbiased=False), entropy, expected, entropy - expected)

    return from_function(problem, "log_softmax", function)


def ours(problem: Problem) -> list[Contestant]:
    return [from_function(problem, OURS, lambda logits: joined(*ensemble_predict(logits)[:5]), kind="ours")]


def moved_bytes(case: PredictCase, dtype: torch.dtype) -> tuple[int, int]:
    """That cannot be avoided: forward, backward."""
    logits, result = case.members * case.batch * case.classes * dtype.itemsize, 4 * case.batch * case.classes
    return logits + 2 * result, 2 * logits + 3 * result


SUITE = Suite(
    name="predict",
    title="Predictions of ensembles: ensemble_predict",
    workloads=PREDICT_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={"softmax": softmax, "log_softmax": log_softmax},
    ours=ours,
    products=lambda case: [],
    plain=lambda problem: copy_limit(*moved_bytes(problem.workload, problem.dtype), problem.device),
)
