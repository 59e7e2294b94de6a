"""rank1_linear on the C++ CPU engine of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native
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
    return _native.ops.rank1_linear_fwd.default(x, weight, r, s, bias, code, save_preactivation)


def bwd(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, saved: Tensor, activation: str | None, *need: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`need`: of the gradients of x, weight, r, s and bias."""
    code = ACTIVATIONS[activation].code
    return _native.ops.rank1_linear_bwd.default(grad, x, weight, r, s, saved, code, *need)
