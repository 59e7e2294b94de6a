"""torch.func.vmap rules: instances are more rows of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registration import LIBRARY
from .autograd import bwd_op, fwd_op


def _vmap_fwd(info, in_dims, logits, backend):
    size = info.batch_size
    results = fwd_op(rows(logits, in_dims[0], size, 1), backend)
    return tuple(t.unflatten(0, (size, -1)) for t in results), (0,) * 6


def _vmap_bwd(info, in_dims, logits, mean_probs, *rest):
    size, (*grads, backend) = info.batch_size, rest
    z = rows(logits, in_dims[0], size, 1)
    others = [rows(t, d, size, 0) for t, d in zip((mean_probs, *grads), in_dims[1:])]
    return bwd_op(z, *others, backend).unflatten(1, (size, -1)), 1


def rows(t: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """Instance and row as one axis; an empty tensor in place of nothing stays one."""
    if dim is None:
        t = t.unsqueeze(axis).expand(*t.shape[:axis], size, *t.shape[axis:])
    else:
        t = t.movedim(dim, axis)
    return t.flatten(axis, axis + 1)


torch.library.register_vmap("effens_kernels::ensemble_predict_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::ensemble_predict_bwd", _vmap_bwd, lib=LIBRARY)
