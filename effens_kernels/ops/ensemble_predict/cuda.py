"""ensemble_predict on the CUDA C++ kernels of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native


def fwd(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _native.cuda_ops.ensemble_predict_fwd.default(logits)


def bwd(
    logits: Tensor,
    mean_probs: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_entropy: Tensor,
    grad_expected: Tensor,
    grad_mutual: Tensor,
) -> Tensor:
    """Gradients that are not given are empty."""
    grads = grad_mean, grad_variance, grad_entropy, grad_expected, grad_mutual
    return _native.cuda_ops.ensemble_predict_bwd.default(logits, mean_probs, *grads)
