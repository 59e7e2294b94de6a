"""rank1_linear on the CUDA C++ kernels of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from ..._precision import uses_tf32
from .._activations import ACTIVATIONS


def fwd(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None,
    activation: str | None,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    code = ACTIVATIONS[activation].code
    how = code, save_preactivation, uses_tf32(x.dtype)
    return _native.cuda_ops.rank1_linear_fwd.default(x, weight, r, s, bias, *how)


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    saved: Tensor,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_r: bool,
    need_s: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    code = ACTIVATIONS[activation].code
    need = need_x, need_weight, need_r, need_s, need_bias
    tf32 = uses_tf32(x.dtype)
    return _native.cuda_ops.rank1_linear_bwd.default(grad, x, weight, r, s, saved, code, *need, tf32)
