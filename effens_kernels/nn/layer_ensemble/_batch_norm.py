"""BatchNorm of prefixes: each is normalized alone, as its path would be, with the parameters of its option.

Running statistics of an option are updated once for each prefix that ends in it, in the order of the prefixes: n
updates r <- (1 - m) r + m s_j become r <- (1 - m)^n r + sum_j m (1 - m)^(n - 1 - j) s_j, one sum for all options.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def takes_batch_statistics(norm: nn.Module) -> bool:
    return norm.training or norm.running_mean is None


def by_batch_statistics(norm: nn.Module, x: Tensor, option: Tensor) -> Tensor:
    """x [U, B, C, ...] with prefix u in option[u]."""
    like = norm.template
    weight, bias = (None if t is None else t[option] for t in (norm.weight, norm.bias))
    tracks = norm.training and like.track_running_stats and norm.running_mean is not None
    found = None
    if tracks:  # with momentum 1, "running" statistics are those of the batch
        found = torch.zeros((2, *x.shape[:1], x.shape[2]), dtype=norm.running_mean.dtype, device=x.device)
    mean, var = (None, None) if found is None else found.unbind(0)

    if x.dim() == 3:  # rows: as one layer of U*C features
        parts = [None if t is None else t.flatten() for t in (mean, var, weight, bias)]
        y = F.batch_norm(x.transpose(0, 1).flatten(1), *parts, True, 1.0, like.eps)
        y = y.unflatten(1, (len(x), -1)).transpose(0, 1)
    else:
        parts = zip(*([None] * len(x) if t is None else t.unbind(0) for t in (mean, var, weight, bias)))
        y = torch.stack([F.batch_norm(rows, *part, True, 1.0, like.eps) for rows, part in zip(x.unbind(0), parts)])
    if tracks:
        _track(norm, mean, var, option)
    return y


def by_running_statistics(norm: nn.Module, x: Tensor, option: Tensor, fresh: bool) -> Tensor:
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.template.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    after = (None,) * (x.dim() - 3)
    scale, shift = (t[option][(slice(None), None, slice(None), *after)] for t in (scale, shift))
    if fresh and not torch.is_grad_enabled() and x.dtype == scale.dtype:
        return x.mul_(scale).add_(shift)
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)


@torch.no_grad()
def _track(norm: nn.Module, mean: Tensor, var: Tensor, option: Tensor) -> None:
    """Take in the statistics [U, C] of prefixes, each into those of its option."""
    options, momentum = norm.running_mean.shape[0], norm.template.momentum
    wide = torch.promote_types(mean.dtype, torch.float32)
    is_of = F.one_hot(option, options)  # [U, K]
    counts, before = is_of.sum(0), norm.num_batches_tracked
    if momentum is None:  # the mean of all batches
        total = (before + counts).clamp(min=1).to(wide)
        factor, kept = total.reciprocal()[option], torch.where(counts > 0, before / total, 1)
    else:
        later = counts[option] - (is_of.cumsum(0) * is_of).sum(1)  # prefixes of the same option that are yet to come
        factor, kept = momentum * (1 - momentum) ** later.to(wide), (1 - momentum) ** counts.to(wide)
    is_of, factor = is_of.t().bool().unsqueeze(2), factor.to(mean.dtype).unsqueeze(1)
    for running, seen in ((norm.running_mean, mean), (norm.running_var, var)):
        own = torch.where(is_of, factor * seen, 0)  # [K, U, C]: no product, in which NaN of one option would reach all
        running.mul_(kept.to(running.dtype).unsqueeze(1)).add_(own.sum(1))
    before.add_(counts)
