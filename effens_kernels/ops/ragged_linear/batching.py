"""torch.func.vmap rules: a mapped axis V folds into the rows where weights and offsets are common, else into members.

Rows stay sorted either way: V of each row beside each other, or the rows of one instance after those of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_offsets
from .._registration import LIBRARY
from .autograd import FORM

fwd_op, bwd_op = FORM.fwd_op, FORM.bwd_op


def _instances(t: Tensor, dim: int | None, size: int) -> Tensor:
    """[V, n, ...]"""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


class _Fold:
    """How V instances become one call."""

    def __init__(self, size: int, by_row: bool) -> None:
        self.size, self.by_row = size, by_row

    def rows(self, t: Tensor, dim: int | None) -> Tensor:
        t = _instances(t, dim, self.size)
        return (t.movedim(0, 1) if self.by_row else t).flatten(0, 1)

    def unfold_rows(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, self.size)).movedim(1, 0) if self.by_row else t.unflatten(0, (self.size, -1))

    def members(self, t: Tensor, dim: int | None) -> Tensor:
        return t if self.by_row else _instances(t, dim, self.size).flatten(0, 1)

    def unfold_members(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (self.size, -1))

    def offsets(self, t: Tensor, dim: int | None, rows: int) -> Tensor:
        if self.by_row:
            return t * self.size
        t = _instances(t, dim, self.size)
        for offsets in t if dim is not None else t[:1]:
            check_offsets("ragged_linear", offsets, rows)
        starts = rows * torch.arange(self.size, dtype=t.dtype, device=t.device)[:, None]
        starts = (t[:, :-1] + starts).flatten()
        return torch.cat([starts, starts.new_full((1,), rows * self.size)])


def _vmap_fwd(info, in_dims, x, weight, offsets, bias, activation, save_preactivation, backend):
    x_dim, weight_dim, offsets_dim, bias_dim = in_dims[:4]
    fold = _Fold(info.batch_size, weight_dim is None and offsets_dim is None and bias_dim is None)
    flat = fold.rows(x, x_dim)
    y, z = fwd_op(
        flat,
        fold.members(weight, weight_dim),
        fold.offsets(offsets, offsets_dim, flat.shape[0] // fold.size),
        None if bias is None else fold.members(bias, bias_dim),
        activation,
        save_preactivation,
        backend,
    )
    return (fold.unfold_rows(y), fold.unfold_rows(z) if save_preactivation else z), (
        0,
        0 if save_preactivation else None,
    )


def _vmap_bwd(info, in_dims, grad, x, weight, offsets, saved, activation, need_x, need_weight, need_bias, backend):
    grad_dim, x_dim, weight_dim, offsets_dim, saved_dim = in_dims[:5]
    fold = _Fold(info.batch_size, weight_dim is None and offsets_dim is None and not (need_weight or need_bias))
    flat = fold.rows(x, x_dim)
    dx, dw, db = bwd_op(
        fold.rows(grad, grad_dim),
        flat,
        fold.members(weight, weight_dim),
        fold.offsets(offsets, offsets_dim, flat.shape[0] // fold.size),
        saved if activation is None else fold.rows(saved, saved_dim),
        activation,
        need_x,
        need_weight,
        need_bias,
        backend,
    )
    grads = (
        fold.unfold_rows(dx) if need_x else dx,
        fold.unfold_members(dw) if need_weight else dw,
        fold.unfold_members(db) if need_bias else db,
    )
    return grads, tuple(0 if need else None for need in (need_x, need_weight, need_bias))


torch.library.register_vmap("effens_kernels::ragged_linear_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::ragged_linear_bwd", _vmap_bwd, lib=LIBRARY)
