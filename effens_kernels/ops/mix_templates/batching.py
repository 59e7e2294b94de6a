"""torch.func.vmap rules: mapped coefficients are more of them, mapped templates more columns of as many."""

from __future__ import annotations

import torch

from .._registration import LIBRARY, one_by_one
from .autograd import bwd_op, fwd_op


def _vmap_fwd(info, in_dims, coefficients, templates, backend):
    size, (c, t) = info.batch_size, in_dims[:2]
    if t is None:  # [V, M, T] -> [V*M, T]
        rows = coefficients.movedim(c, 0)
        return fwd_op(rows.flatten(0, 1), templates, backend).unflatten(0, rows.shape[:2]), 0
    if c is None:  # [T, V, N] -> [T, V*N]
        columns = templates.movedim(t, 1)
        return fwd_op(coefficients, columns.flatten(1), backend).unflatten(1, columns.shape[1:]), 1
    return one_by_one(fwd_op, size, in_dims[:2], (coefficients, templates), (backend,))[0], 0


def _vmap_bwd(info, in_dims, grad, coefficients, templates, *rest):
    tensors, need = (grad, coefficients, templates), rest[:2]
    return tuple(one_by_one(bwd_op, info.batch_size, in_dims[:3], tensors, rest)), tuple(0 if n else None for n in need)


torch.library.register_vmap("effens_kernels::mix_templates_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::mix_templates_bwd", _vmap_bwd, lib=LIBRARY)
