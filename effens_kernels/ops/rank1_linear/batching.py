"""torch.func.vmap rules: a mapped axis V becomes more members, which share the weight; else one instance at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registration import LIBRARY, one_by_one
from .autograd import FORM

_FACTORS = len(FORM.factors)


def _vmap_fwd(info, in_dims, x, weight, r, s, bias, activation, save_preactivation, backend):
    size, tensors = info.batch_size, (x, weight, r, s, bias)
    if in_dims[1] is not None:
        arguments = (activation, save_preactivation, backend)
        y, z = one_by_one(FORM.fwd_op, size, in_dims[:5], tensors, arguments)
    else:
        mapped = [d is not None for d in in_dims[:5]]
        x, _, r, s, bias = (t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims))
        members = r.shape[-2]

        def flat(t: Tensor | None, of_all: bool) -> Tensor | None:  # [V, E, ...] or [E, ...] -> [V*E, ...]
            return t if t is None else (t if of_all else t.expand(size, *t.shape)).flatten(0, 1)

        if x.dim() - mapped[0] == 3:
            x = flat(x, mapped[0])
        elif mapped[0]:  # rows shared by the members of one instance
            x = x[:, None].expand(size, members, *x.shape[1:]).flatten(0, 1)
        r, s, bias = (flat(t, of_all) for t, of_all in zip((r, s, bias), mapped[2:]))
        y, z = FORM.fwd_op(x, weight, r, s, bias, activation, save_preactivation, backend)
        y = y.unflatten(0, (size, members))
        z = z.unflatten(0, (size, members)) if save_preactivation else z
    return (y, z), (0, 0 if save_preactivation else None)


def _vmap_bwd(info, in_dims, *arguments):
    tensors, rest = arguments[: _FACTORS + 2], arguments[_FACTORS + 2 :]
    need = rest[1:-1]
    grads = one_by_one(FORM.bwd_op, info.batch_size, in_dims[: _FACTORS + 2], tensors, rest)
    return tuple(grads), tuple(0 if n else None for n in need)


torch.library.register_vmap("effens_kernels::rank1_linear_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::rank1_linear_bwd", _vmap_bwd, lib=LIBRARY)
