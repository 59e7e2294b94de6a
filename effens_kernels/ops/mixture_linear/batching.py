"""torch.func.vmap rules: mapped coefficients are more members, which share the templates; else one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registration import LIBRARY, one_by_one
from .autograd import FORM

_FACTORS = len(FORM.factors)


def _vmap_fwd(info, in_dims, x, coefficients, templates, bias, *rest):
    size, tensors = info.batch_size, (x, coefficients, templates, bias)
    save_preactivation = rest[1]
    if in_dims[2] is not None:
        y, z = one_by_one(FORM.fwd_op, size, in_dims[:4], tensors, rest)
    else:
        mapped = [d is not None for d in in_dims[:4]]
        x, coefficients, _, bias = (t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims))
        members = coefficients.shape[-2]

        def flat(t: Tensor | None, of_all: bool) -> Tensor | None:  # [V, E, ...] or [E, ...] -> [V*E, ...]
            return t if t is None else (t if of_all else t.expand(size, *t.shape)).flatten(0, 1)

        if x.dim() - mapped[0] == 3:
            x = flat(x, mapped[0])
        elif mapped[0]:  # rows shared by the members of one instance
            x = x[:, None].expand(size, members, *x.shape[1:]).flatten(0, 1)
        y, z = FORM.fwd_op(x, flat(coefficients, mapped[1]), templates, flat(bias, mapped[3]), *rest)
        y = y.unflatten(0, (size, members))
        z = z.unflatten(0, (size, members)) if save_preactivation else z
    return (y, z), (0, 0 if save_preactivation else None)


def _vmap_bwd(info, in_dims, *arguments):
    tensors, rest = arguments[: _FACTORS + 2], arguments[_FACTORS + 2 :]
    need = rest[1:-1]
    grads = one_by_one(FORM.bwd_op, info.batch_size, in_dims[: _FACTORS + 2], tensors, rest)
    return tuple(grads), tuple(0 if n else None for n in need)


torch.library.register_vmap("effens_kernels::mixture_linear_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::mixture_linear_bwd", _vmap_bwd, lib=LIBRARY)
