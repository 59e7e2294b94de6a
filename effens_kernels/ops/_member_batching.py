"""torch.func.vmap rules of linear forms whose members share a factor: a mapped axis V becomes more members.

Where the shared factor itself is mapped, and in backward: one instance at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._linear_form import LinearForm
from ._registration import LIBRARY, one_by_one


def register_vmap(form: LinearForm, shared: str) -> None:
    """`shared` is the factor without an axis of members; x may be without one, every other has it first."""
    count, common = len(form.factors), form.factors.index(shared)
    per_member = next(n for n in range(1, count) if n != common)

    def fwd(info, in_dims, *arguments):
        size, tensors, rest = info.batch_size, arguments[: count + 1], arguments[count + 1 :]
        save_preactivation = rest[1]
        if in_dims[common] is not None:
            y, z = one_by_one(form.fwd_op, size, in_dims[: count + 1], tensors, rest)
        else:
            mapped = [d is not None for d in in_dims[: count + 1]]
            tensors = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims)]
            members = tensors[per_member].shape[-2]

            def flat(t: Tensor | None, of_all: bool) -> Tensor | None:  # [V, E, ...] or [E, ...] -> [V*E, ...]
                return t if t is None else (t if of_all else t.expand(size, *t.shape)).flatten(0, 1)

            x = tensors[0]
            if x.dim() - mapped[0] == 3:
                x = flat(x, mapped[0])
            elif mapped[0]:  # rows shared by the members of one instance
                x = x[:, None].expand(size, members, *x.shape[1:]).flatten(0, 1)
            others = [t if n == common else flat(t, mapped[n]) for n, t in enumerate(tensors) if n]
            y, z = form.fwd_op(x, *others, *rest)
            y = y.unflatten(0, (size, members))
            z = z.unflatten(0, (size, members)) if save_preactivation else z
        return (y, z), (0, 0 if save_preactivation else None)

    def bwd(info, in_dims, *arguments):
        tensors, rest = arguments[: count + 2], arguments[count + 2 :]
        need = rest[1:-1]
        grads = one_by_one(form.bwd_op, info.batch_size, in_dims[: count + 2], tensors, rest)
        return tuple(grads), tuple(0 if n else None for n in need)

    torch.library.register_vmap(f"effens_kernels::{form.name}_fwd", fwd, lib=LIBRARY)
    torch.library.register_vmap(f"effens_kernels::{form.name}_bwd", bwd, lib=LIBRARY)
