"""rank1_mlp through the compiled extension: rank1_linear's C++ layer after layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _native
from .._activations import ACTIVATIONS


def fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    r: Sequence[Tensor],
    s: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
    save: bool,
) -> list[Tensor]:
    """[y], and with `save` all that backward needs of the layers (bind_rank1_mlp.cpp)."""
    codes = ACTIVATIONS[activation].code, ACTIVATIONS[out_activation].code
    return _native.ops.rank1_mlp_fwd.default(x, weights, r, s, biases, *codes, save)


def bwd(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    r: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Tensor,
    kept: Sequence[Tensor],
    activation: str | None,
    out_activation: str | None,
    need_x: bool,
) -> list[Tensor]:
    """[dx], the gradients of the weights, of r, of s, of the biases."""
    codes = ACTIVATIONS[activation].code, ACTIVATIONS[out_activation].code
    return _native.ops.rank1_mlp_bwd.default(grad, x, weights, r, s, y, kept, *codes, need_x)
