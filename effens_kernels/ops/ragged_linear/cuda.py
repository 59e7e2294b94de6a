"""ragged_linear through the CUDA C++ kernels of the compiled extension: one launch forward, at most two backward."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from ..._precision import uses_tf32
from .._activations import ACTIVATIONS


def fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    activation: str | None,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    code = ACTIVATIONS[activation].code
    tf32 = uses_tf32(x.dtype)
    return _native.cuda_ops.ragged_linear_fwd.default(x, weight, offsets, bias, code, save_preactivation, tf32)


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    saved: Tensor,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    code, tf32 = ACTIVATIONS[activation].code, uses_tf32(x.dtype)
    need = need_x, need_weight, need_bias
    return _native.cuda_ops.ragged_linear_bwd.default(grad, x, weight, offsets, saved, code, *need, tf32)
