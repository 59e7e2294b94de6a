"""mixture_linear on the C++ CPU engine of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch, _native
from .._activations import ACTIVATIONS
from ..grouped_linear import native as linear
from ..mix_templates import native as mixing
from . import routes, synthesis


def _blocks_fwd(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None,
    activation: str | None,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    code = ACTIVATIONS[activation].code
    return _native.ops.mixture_linear_fwd.default(x, coefficients, templates, bias, code, save_preactivation)


def _blocks_bwd(
    grad: Tensor,
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    saved: Tensor,
    activation: str | None,
    need_x: bool,
    *need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = grad, x, coefficients, templates, saved
    whole = need_x and (x.dim() == 2 or _dispatch.mixes_whole_for_inputs(templates.numel() * templates.itemsize))
    code = ACTIVATIONS[activation].code
    if not whole:
        return _native.ops.mixture_linear_bwd.default(*arguments, code, need_x, *need)
    grads = _whole_bwd(*arguments, activation, True, False, False, False)
    if any(need):
        return grads[0], *_native.ops.mixture_linear_bwd.default(*arguments, code, False, *need)[1:]
    return grads


_, _whole_bwd = synthesis.over(mixing, linear)
fwd, bwd = routes.over(mixing, linear, (_blocks_fwd, _blocks_bwd))
