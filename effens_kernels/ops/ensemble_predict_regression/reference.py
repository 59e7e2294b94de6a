"""ensemble_predict_regression in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def fwd(means: Tensor, variances: Tensor | None) -> Results:
    """Of means and variances [E, N]; differentiable."""
    means = _wide(means)
    mean = means.mean(0)
    epistemic = (means - mean).square().mean(0)
    aleatoric = torch.zeros_like(mean) if variances is None else _wide(variances).mean(0)
    return mean, aleatoric + epistemic, aleatoric, epistemic


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
    """(dL/dmeans, dL/dvariances), an empty tensor in place of each that is not needed; gradients that are not given are
    empty.  Differentiable."""
    members, dtype = means.shape[0], means.dtype
    dmeans = dvariances = means.new_empty(0)
    if need_means:
        of_difference = _sum(mean, grad_variance, grad_epistemic)
        dmeans = ((_sum(mean, grad_mean) + 2 * of_difference * (_wide(means) - mean)) / members).to(dtype).contiguous()
    if need_variances:
        of_each = _sum(mean, grad_variance, grad_aleatoric) / members
        dvariances = of_each.to(dtype).expand(means.shape).contiguous()
    return dmeans, dvariances


def _sum(like: Tensor, *grads: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for grad in grads:
        if grad.shape == like.shape:
            total = total + grad
    return total


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
