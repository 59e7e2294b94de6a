"""mixture_linear by the one of two ways that takes less: weights mixed, or outputs mixed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from ... import _dispatch
from . import outputs, synthesis


def over(mixing: ModuleType, linear: ModuleType) -> tuple[Callable, Callable]:
    """(fwd, bwd) of mixture_linear from those of mix_templates and grouped_linear of one backend."""
    routes = {"outputs": outputs.over(mixing, linear), "weights": synthesis.over(mixing, linear)}

    def fwd(x: Tensor, coefficients: Tensor, templates: Tensor, *rest):
        return routes[_route(x, coefficients, templates)][0](x, coefficients, templates, *rest)

    def bwd(grad: Tensor, x: Tensor, coefficients: Tensor, templates: Tensor, *rest):
        return routes[_route(x, coefficients, templates)][1](grad, x, coefficients, templates, *rest)

    return fwd, bwd


def _route(x: Tensor, coefficients: Tensor, templates: Tensor) -> str:
    members, count = coefficients.shape
    sizes = members, x.shape[-2], x.shape[-1], templates.shape[1]
    return _dispatch.mixture_route(
        _dispatch.Problem("mixture_linear", x.device.type, x.dtype, sizes), count, x.dim() == 2
    )
