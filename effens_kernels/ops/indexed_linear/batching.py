"""torch.func.vmap rules: a mapped axis V becomes V times as many groups, and inputs or weights where these are mapped.

What each instance has its own gradient of is repeated for that, mapped or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_range
from .._registration import LIBRARY
from .autograd import FORM

fwd_op, bwd_op = FORM.fwd_op, FORM.bwd_op


def _instances(t: Tensor, dim: int | None, size: int) -> Tensor:
    """[V, n, ...]"""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _matrices(t: Tensor, dim: int | None, own: bool, size: int) -> tuple[Tensor, int]:
    """[V*n, ...] where each instance has its own, else [n, ...]; and n."""
    if not own:
        return t, t.shape[0]
    t = _instances(t, dim, size)
    return t.flatten(0, 1), t.shape[1]


def _numbers(name: str, index: Tensor, dim: int | None, count: int, own: bool, size: int) -> Tensor:
    """The index of all instances, into `count` matrices of each."""
    check_range("indexed_linear", name, index.reshape(-1), count, name.removesuffix("_index"))
    index = _instances(index, dim, size)
    if own:
        index = index + count * torch.arange(size, dtype=index.dtype, device=index.device)[:, None]
    return index.flatten()


def _operands(size: int, in_dims, own, x, weight, x_index, weight_index) -> tuple[Tensor, ...]:
    x, inputs = _matrices(x, in_dims[0], own[0], size)
    weight, members = _matrices(weight, in_dims[1], own[1], size)
    x_index = _numbers("x_index", x_index, in_dims[2], inputs, own[0], size)
    return x, weight, x_index, _numbers("weight_index", weight_index, in_dims[3], members, own[1], size)


def _vmap_fwd(info, in_dims, *arguments):
    size, bias, rest = info.batch_size, arguments[4], arguments[5:]
    own = in_dims[0] is not None, in_dims[1] is not None or in_dims[4] is not None
    operands = _operands(size, in_dims, own, *arguments[:4])
    if bias is not None:
        bias, _ = _matrices(bias, in_dims[4], own[1], size)
    y, z = fwd_op(*operands, bias, *rest)
    save_preactivation = rest[1]
    y, z = y.unflatten(0, (size, -1)), z.unflatten(0, (size, -1)) if save_preactivation else z
    return (y, z), (0, 0 if save_preactivation else None)


def _vmap_bwd(info, in_dims, *arguments):
    size, saved, rest = info.batch_size, arguments[5], arguments[6:]
    activation, need_x, need_weight, need_bias, _ = rest
    own = in_dims[1] is not None or need_x, in_dims[2] is not None or need_weight or need_bias
    operands = _operands(size, in_dims[1:], own, *arguments[1:5])
    grad = _instances(arguments[0], in_dims[0], size).flatten(0, 1)
    if activation is not None:
        saved = _instances(saved, in_dims[5], size).flatten(0, 1)
    need = need_x, need_weight, need_bias
    grads = bwd_op(grad, *operands, saved, *rest)
    return tuple(g.unflatten(0, (size, -1)) if n else g for g, n in zip(grads, need)), tuple(
        0 if n else None for n in need
    )


torch.library.register_vmap("effens_kernels::indexed_linear_fwd", _vmap_fwd, lib=LIBRARY)
torch.library.register_vmap("effens_kernels::indexed_linear_bwd", _vmap_bwd, lib=LIBRARY)
