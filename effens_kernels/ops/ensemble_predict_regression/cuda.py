"""ensemble_predict_regression on the CUDA C++ kernels of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native


def fwd(means: Tensor, variances: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _native.cuda_ops.ensemble_predict_regression_fwd.default(means, variances)


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
    """Gradients that are not given are empty, and so are those that are not needed."""
    grads = grad_mean, grad_variance, grad_aleatoric, grad_epistemic
    return _native.cuda_ops.ensemble_predict_regression_bwd.default(means, mean, *grads, need_means, need_variances)
