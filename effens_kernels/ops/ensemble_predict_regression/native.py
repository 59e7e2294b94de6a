"""ensemble_predict_regression on the C++ CPU engine of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from .reference import Results


def fwd(means: Tensor, variances: Tensor | None) -> Results:
    return _native.ops.ensemble_predict_regression_fwd.default(means, variances)


def bwd(
    means: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_aleatoric: Tensor,
    grad_epistemic: Tensor,
    need_means: bool,
    need_variances: bool,
) -> tuple[Tensor, Tensor]:
    return _native.ops.ensemble_predict_regression_bwd.default(
        means, mean, grad_mean, grad_variance, grad_aleatoric, grad_epistemic, need_means, need_variances
    )
