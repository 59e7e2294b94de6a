"""mixture_linear by the one of its ways that takes least: see `_dispatch.mixture_route`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from ... import _dispatch
from . import outputs, synthesis

Kernels = tuple[Callable, Callable]  # fwd, bwd


def over(mixing: ModuleType, linear: ModuleType, blocks: Kernels | None = None) -> Kernels:
    """mixture_linear from one backend's mix_templates and grouped_linear, and its own kernels if it has any."""
    routes = {"outputs": outputs.over(mixing, linear), "weights": synthesis.over(mixing, linear), "blocks": blocks}

    def chosen(x: Tensor, coefficients: Tensor, templates: Tensor) -> Kernels:
        return routes[_route(x, coefficients, templates, blocks is not None)]

    def fwd(x: Tensor, coefficients: Tensor, templates: Tensor, *rest):
        return chosen(x, coefficients, templates)[0](x, coefficients, templates, *rest)

    def bwd(grad: Tensor, x: Tensor, coefficients: Tensor, templates: Tensor, *rest):
        return chosen(x, coefficients, templates)[1](grad, x, coefficients, templates, *rest)

    return fwd, bwd


def _route(x: Tensor, coefficients: Tensor, templates: Tensor, has_blocks: bool) -> str:
    members, count = coefficients.shape
    sizes = members, x.shape[-2], x.shape[-1], templates.shape[1]
    return _dispatch.mixture_route(
        _dispatch.Problem("mixture_linear", x.device.type, x.dtype, sizes), count, x.dim() == 2, has_blocks
    )
