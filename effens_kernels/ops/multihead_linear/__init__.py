"""multihead_linear: H linear heads on common features, as one product over H * O outputs."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_tensor, reject
from ..grouped_linear import run

__all__ = ["multihead_linear"]


def multihead_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    r"""Apply H linear heads to the same features, for one trunk or for one trunk per member.

    .. math:: y_h = x W_h^\top + b_h \quad\text{or}\quad y_{eh} = x_e W_{eh}^\top + b_{eh}

    the bootstrap heads of Osband et al. 2016 ("Deep Exploration via Bootstrapped DQN", section 3).  The heads fold
    into the output axis of one `grouped_linear`, so the features are neither sliced nor copied per head, and
    backward sums the heads' gradients inside the product instead of in H full-size additions.

    Args:
        x: `[B, I]` or `[E, B, I]` features.
        weight: `[H, O, I]` (with `x` `[B, I]`) or `[E, H, O, I]` (with either `x`).
        bias: `[H, O]` or `[E, H, O]` like `weight`, or None.
        backend: as in :func:`grouped_linear`.

    Returns:
        `[B, H, O]`, or `[E, B, H, O]` where `weight` has members.

    dtypes, strides, derivatives and errors are those of :func:`grouped_linear`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> features, weight = torch.randn(32, 64), torch.randn(10, 4, 64)   # 10 heads of 4 actions
        >>> ek.multihead_linear(features, weight).shape
        torch.Size([32, 10, 4])
    """
    op = "multihead_linear"
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight)
    if weight.dim() not in (3, 4):
        reject(op, "weight", "[H, O, I] or [E, H, O, I]", weight)
    if x.dim() not in (2, 3) or x.dim() > weight.dim() - 1:
        expected = "[B, I]" if weight.dim() == 3 else "[B, I] or [E, B, I]"
        reject(op, "x", f"{expected} with weight {list(weight.shape)}", x)
    members = 1 if weight.dim() == 3 else weight.shape[0]
    heads, outputs, inputs = weight.shape[-3:]
    if bias is not None:
        check_tensor(op, "bias", bias)
        if bias.shape != weight.shape[:-1]:
            reject(op, "bias", f"{list(weight.shape[:-1])} to fit weight {list(weight.shape)}", bias)
        bias = bias.reshape(members, heads * outputs)
    folded = weight.reshape(members, heads * outputs, inputs)
    y = run(op, x, folded, bias, None, backend).unflatten(-1, (heads, outputs))
    return y.squeeze(0) if weight.dim() == 3 else y
