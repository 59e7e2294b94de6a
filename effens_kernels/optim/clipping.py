"""clip_grad_norm_: gradients of stacked parameters, clipped member by member."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isnan

import torch
from torch import Tensor

from ..ops._checks import check_tensor, reject
from ._per_member import Range, per_member, plain

_LIMIT = Range(-inf, inf, "a number", with_below=True)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor | list[float],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    r"""Scale each member's gradients, in place, to a norm of at most `max_norm`, and return what the norms were.

    .. math:: g_e \leftarrow \min\!\left(1, \frac{c_e}{\|g_e\| + 10^{-6}}\right) g_e

    with :math:`\|g_e\|` of all gradients of member e together: `torch.nn.utils.clip_grad_norm_` for each member's model
    (Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1).  So that one member
    whose gradients explode does not shrink those of the others.

    Args:
        parameters: `[E, ...]`, the axis of members in front; those without a gradient count as 0.
        max_norm: c, a number or one for each member: a tensor `[E]` or a list; `inf` does not clip.
        norm_type: p of the p-norm; `inf` for the largest magnitude.
        error_if_nonfinite: a norm that is infinite or NaN is an error, and no gradient is changed.

    Returns:
        `[E]`, the norms before, in float32 or float64, on the device of the first gradient.

    Norms are summed and gradients scaled in float32 at least.  A member whose norm is not finite gets gradients of 0
    and NaN, as in PyTorch; the others do not notice.

    Raises:
        TypeError: an argument is no tensor or number, or of an unsupported dtype; a sparse gradient.
        ValueError: no parameters; parameters that are not all `[E, ...]`, or of another E than max_norm.
        RuntimeError: a norm that is not finite, if that is to be an error.

    Example:
        >>> import torch, effens_kernels as ek
        >>> weight = torch.nn.Parameter(torch.zeros(3, 2))
        >>> weight.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])
        >>> ek.optim.clip_grad_norm_([weight], max_norm=1.0)
        tensor([ 5.0000,  0.5000, 50.0000])
        >>> weight.grad
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000],
                [0.6000, 0.8000]])
    """
    op = "clip_grad_norm_"
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    max_norm = plain(per_member(op, "max_norm", max_norm, _LIMIT))
    members = _check(op, parameters, max_norm, norm_type)
    grads = [p.grad for p in parameters if p.grad is not None]
    first = grads[0] if grads else parameters[0]
    wide = torch.promote_types(torch.float32, first.dtype)
    for g in grads:
        wide = torch.promote_types(wide, g.dtype)
    norms = [_norms(g, float(norm_type), wide).to(first.device) for g in grads if g.numel()]
    if norms:
        total = torch.linalg.vector_norm(torch.stack(norms), float(norm_type), dim=0)
    else:
        total = torch.zeros(members, dtype=wide, device=first.device)
    if error_if_nonfinite and not total.isfinite().all():
        wrong = (~total.isfinite()).nonzero()[:, 0].tolist()
        raise RuntimeError(
            f"{op}: the norm of the gradients of member {', '.join(map(str, wrong))} is not finite; they were not "
            "clipped (error_if_nonfinite=False scales them all the same)"
        )
    limit = max_norm.to(total) if isinstance(max_norm, Tensor) else max_norm
    by = (limit / (total + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(by.to(g.device).view(-1, *(1,) * (g.dim() - 1)))
    return total


def _norms(grad: Tensor, norm_type: float, dtype: torch.dtype) -> Tensor:
    """`[E]`, of each member."""
    rows = grad.unsqueeze(1) if grad.dim() == 1 else grad
    return torch.linalg.vector_norm(rows, norm_type, dim=tuple(range(1, rows.dim())), dtype=dtype)


def _check(op: str, parameters: list[Tensor], max_norm: float | Tensor, norm_type: float) -> int:
    """The number of members."""
    if not parameters:
        reject(op, "parameters", "at least one", "none")
    if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)) or isnan(norm_type):
        reject(op, "norm_type", "a number", repr(norm_type), TypeError)
    members = len(max_norm) if isinstance(max_norm, Tensor) else None
    for n, p in enumerate(parameters):
        check_tensor(op, f"parameters[{n}]", p)
        if p.grad is not None:
            check_tensor(op, f"parameters[{n}].grad", p.grad)
        if p.dim() == 0 or p.shape[0] != (p.shape[0] if members is None else members):
            reject(op, f"parameters[{n}]", f"[E{'' if members is None else f'={members}'}, ...]", p)
        members = p.shape[0]
    return members
