"""torch.func.vmap rules: a mapped axis V folds into the rows B where weights are common, else into the members E."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registration import LIBRARY
from .autograd import FORM

fwd_op, bwd_op = FORM.fwd_op, FORM.bwd_op


def _front(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 0)


def _into_rows(t: Tensor) -> Tensor:
    """[V, E, B, F] -> [E, V*B, F], [V, B, F] -> [V*B, F]"""
    return t.movedim(0, -3).flatten(-3, -2)


def _from_rows(t: Tensor, size: int, rows: int) -> Tensor:
    return t.unflatten(-2, (size, rows)).movedim(-3, 0)


def _into_members(t: Tensor, mapped: bool, size: int) -> Tensor:
    """[V, E, ...] or, unmapped, [E, ...] -> [V*E, ...]"""
    return (t if mapped else t.expand(size, *t.shape)).flatten(0, 1)


def _per_member(x: Tensor, mapped: bool, size: int, members: int) -> Tensor:
    """x as [V*E, B, I]; rows shared by the members of one mapped instance are repeated, since E varies fastest."""
    if x.dim() - mapped == 2:
        x = x.unsqueeze(-3).expand(*x.shape[:-2], members, *x.shape[-2:])
    return _into_members(x, mapped, size)


def _vmap_fwd(info, in_dims, x, weight, bias, activation, save_preactivation, backend):
    size = info.batch_size
    x_mapped, weight_mapped, bias_mapped = (d is not None for d in in_dims[:3])
    x, weight, bias = (_front(t, d) for t, d in zip((x, weight, bias), in_dims))
    tail = (activation, save_preactivation, backend)
    if x_mapped and not weight_mapped and not bias_mapped:
        rows = x.shape[-2]
        y, z = fwd_op(_into_rows(x), weight, bias, *tail)
        y, z = _from_rows(y, size, rows), _from_rows(z, size, rows) if save_preactivation else z
    else:
        members = weight.shape[-3]
        if x_mapped or x.dim() == 3:
            x = _per_member(x, x_mapped, size, members)
        weight = _into_members(weight, weight_mapped, size)
        bias = None if bias is None else _into_members(bias, bias_mapped, size)
        y, z = fwd_op(x, weight, bias, *tail)
        y = y.unflatten(0, (size, members))
        z = z.unflatten(0, (size, members)) if save_preactivation else z
    return (y, z), (0, 0 if save_preactivation else None)


def _vmap_bwd(info, in_dims, grad, x, weight, saved, activation, need_x, need_weight, need_bias, backend):
    size = info.batch_size
    mapped = [d is not None for d in in_dims[:4]]
    grad, x, weight, saved = (_front(t, d) for t, d in zip((grad, x, weight, saved), in_dims))
    members = weight.shape[-3]
    shared = x.dim() - mapped[1] == 2
    has_saved = activation is not None  # of any size, zero included
    if not mapped[0]:
        grad = grad.expand(size, *grad.shape)
    if has_saved and not mapped[3]:
        saved = saved.expand(size, *saved.shape)
    grad_x = grad_weight = grad_bias = x.new_empty(0)
    if need_x and not mapped[2]:
        rows = _into_rows(x if mapped[1] else x.expand(size, *x.shape))
        saved_rows = _into_rows(saved) if has_saved else saved
        grad_x = bwd_op(_into_rows(grad), rows, weight, saved_rows, activation, True, False, False, backend)[0]
        grad_x = _from_rows(grad_x, size, grad.shape[-2])
        need_x_here = False
    else:
        need_x_here = need_x
    if need_x_here or need_weight or need_bias:
        if shared and not mapped[1] and not need_x_here:
            x_flat = x
        else:
            x_flat = _per_member(x, mapped[1], size, members)
        weight_flat = (
            weight.flatten(0, 1) if mapped[2] else weight.new_empty(()).expand(size * members, *weight.shape[1:])
        )
        flat = bwd_op(
            grad.flatten(0, 1),
            x_flat,
            weight_flat,
            saved.flatten(0, 1) if has_saved else saved,
            activation,
            need_x_here,
            need_weight,
            need_bias,
            backend,
        )
        if need_x_here:
            grad_x = flat[0].unflatten(0, (size, members))
            grad_x = grad_x.sum(1) if shared else grad_x
        grad_weight, grad_bias = (
            f.unflatten(0, (size, members)) if need else f for f, need in zip(flat[1:], (need_weight, need_bias))
        )
    out = (grad_x, grad_weight, grad_bias)
    return out, tuple(0 if need else None for need in (need_x, need_weight, need_bias))


torch.library.register_vmap("effens_kernels::grouped_linear_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::grouped_linear_bwd", _vmap_bwd, lib=LIBRARY)
