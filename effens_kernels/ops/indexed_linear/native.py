"""indexed_linear on the C++ CPU engine of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native
from .._activations import ACTIVATIONS


def fwd(
    x: Tensor,
    weight: Tensor,
    x_index: Tensor,
    weight_index: Tensor,
    bias: Tensor | None,
    activation: str | None,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    code = ACTIVATIONS[activation].code
    return _native.ops.indexed_linear_fwd.default(x, weight, x_index, weight_index, bias, code, save_preactivation)


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_index: Tensor,
    weight_index: Tensor,
    saved: Tensor,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    code = ACTIVATIONS[activation].code
    need = need_x, need_weight, need_bias
    return _native.ops.indexed_linear_bwd.default(grad, x, weight, x_index, weight_index, saved, code, *need)
