"""ensemble_predict in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def fwd(logits: Tensor) -> Results:
    """Of logits [E, B, C]; differentiable."""
    p, log_p = _probabilities(logits)
    mean = p.mean(0)
    difference = p - mean
    variance = difference.square().mean(0)
    entropy = -(mean * _log(mean)).sum(-1)
    expected_entropy = -(p * log_p).sum(-1).mean(0)
    # The mean of KL(p_e || mean), where a difference of two entropies would be rounding errors if members nearly agree.
    # The last term is 0 in sum; it makes each term one of at least 0, of the order of the difference's square.
    near = difference > -0.5 * mean
    log_ratio = torch.where(near, (difference / _nonzero(mean)).masked_fill(~near, 0).log1p(), log_p - _log(mean))
    excess = p * log_ratio - difference
    mutual_information = excess.sum(-1).mean(0).clamp_min(0)
    disagreement = _disagreement(logits.argmax(-1), mean).masked_fill(entropy.isnan(), torch.nan)
    return mean.contiguous(), variance.contiguous(), entropy, expected_entropy, mutual_information, disagreement


def bwd(
    logits: Tensor,
    mean_probs: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_entropy: Tensor,
    grad_expected: Tensor,
    grad_mutual: Tensor,
) -> Tensor:
    """dL/dlogits; gradients that are not given are empty.  Differentiable."""
    p, log_p = _probabilities(logits)
    v = torch.zeros_like(p)
    if _given(grad_mean):
        v = v + grad_mean
    if _given(grad_variance):
        v = v + 2 * grad_variance * (p - mean_probs)
    log_mean = _log(mean_probs)
    if _given(grad_entropy):
        v = v - grad_entropy.unsqueeze(-1) * log_mean
    if _given(grad_expected):
        v = v - grad_expected.unsqueeze(-1) * log_p
    if _given(grad_mutual):
        v = v + grad_mutual.unsqueeze(-1) * torch.where(p > 0, log_p - log_mean, 0)
    v = v / logits.shape[0]
    return (p * (v - (p * v).sum(-1, keepdim=True))).to(logits.dtype).contiguous()


def _disagreement(predicted: Tensor, like: Tensor) -> Tensor:
    """Of classes [E, B]: from each class's votes [B, C], as n (n - 1) ordered pairs agree on a class of n votes."""
    members = predicted.shape[0]
    one = like.new_ones(()).expand(predicted.mT.shape)
    votes = torch.zeros_like(like.detach()).scatter_add(-1, predicted.mT, one)
    pairs = members * (members - 1)
    return (pairs - (votes * (votes - 1)).sum(-1)) / max(1, pairs)


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """And their logarithms; 0 in place of that of 0, which it is multiplied by."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    p = log_p.exp()
    return p, log_p.masked_fill(p == 0, 0)


def _log(mean: Tensor) -> Tensor:
    return _nonzero(mean).log()


def _nonzero(mean: Tensor) -> Tensor:
    return mean.masked_fill(mean == 0, 1)


def _given(grad: Tensor) -> bool:
    return grad.shape != (0,)
