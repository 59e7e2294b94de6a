"""ensemble_predict on the C++ CPU engine of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from .reference import Results


def fwd(logits: Tensor) -> Results:
    return _native.ops.ensemble_predict_fwd.default(logits)


def bwd(
    logits: Tensor,
    mean_probs: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_entropy: Tensor,
    grad_expected: Tensor,
    grad_mutual: Tensor,
) -> Tensor:
    return _native.ops.ensemble_predict_bwd.default(
        logits, mean_probs, grad_mean, grad_variance, grad_entropy, grad_expected, grad_mutual
    )
