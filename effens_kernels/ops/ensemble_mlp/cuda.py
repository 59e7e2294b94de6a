"""ensemble_mlp on the CUDA C++ kernels of the compiled extension: all layers of all members in one launch.

Backward takes one for the gradients between layers, one for those of all weights and biases, and one for that of a
shared x.  `_dispatch.takes_mlp` says which layers they take.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _native
from ..._precision import uses_tf32
from .._activations import ACTIVATIONS


def fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y, and with `save` all that backward needs of the hidden layers in one flat tensor (bind_ensemble_mlp.cu)."""
    codes = ACTIVATIONS[activation].code, ACTIVATIONS[out_activation].code
    return _native.cuda_ops.ensemble_mlp_fwd.default(x, weights, biases, *codes, save, uses_tf32(x.dtype))


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
    return _native.cuda_ops.ensemble_mlp_bwd.default(grad, x, weights, y, hidden, *codes, need_x, uses_tf32(x.dtype))
