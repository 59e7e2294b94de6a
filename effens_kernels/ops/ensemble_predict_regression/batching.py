"""torch.func.vmap rules: instances are more columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registration import LIBRARY
from ..ensemble_predict.batching import rows
from .autograd import bwd_op, fwd_op


def _vmap_fwd(info, in_dims, means, variances, backend):
    size = info.batch_size
    columns = [None if t is None else rows(t, d, size, 1) for t, d in zip((means, variances), in_dims)]
    return tuple(t.unflatten(0, (size, -1)) for t in fwd_op(*columns, backend)), (0,) * 4


def _vmap_bwd(info, in_dims, means: Tensor, *rest):
    size, (*tensors, need_means, need_variances, backend) = info.batch_size, rest
    need = need_means, need_variances
    columns = [rows(t, d, size, 0) for t, d in zip(tensors, in_dims[1:])]
    found = bwd_op(rows(means, in_dims[0], size, 1), *columns, *need, backend)
    dims = tuple(1 if n else None for n in need)
    return tuple(t.unflatten(1, (size, -1)) if n else t for t, n in zip(found, need)), dims


torch.library.register_vmap("effens_kernels::ensemble_predict_regression_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::ensemble_predict_regression_bwd", _vmap_bwd, lib=LIBRARY)
