"""ensemble_mlp through the compiled extension: the C++ engine goes through all layers member by member."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _native
from .._activations import ACTIVATIONS


def fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y, and with `save` all that backward needs of the hidden layers in one flat tensor (bind_ensemble_mlp.cpp)."""
    codes = ACTIVATIONS[activation].code, ACTIVATIONS[out_activation].code
    return _native.ops.ensemble_mlp_fwd.default(x, weights, biases, *codes, save)


def bwd(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    y: Tensor,
    hidden: Tensor,
    activation: str | None,
    out_activation: str | None,
    need_x: bool,
) -> list[Tensor]:
    """[dx], the weights' gradients, the biases' gradients."""
    codes = ACTIVATIONS[activation].code, ACTIVATIONS[out_activation].code
    return _native.ops.ensemble_mlp_bwd.default(grad, x, weights, y, hidden, *codes, need_x)
