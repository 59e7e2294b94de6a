"""mixture_conv2d in operations that record their own derivatives: mixed weights, then one convolution per member.

The oracle of the tests, and what runs where something must see the operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._convolution import Options, output_sizes
from ..mix_templates import mix_templates


def mixture_conv(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None = None,
    options: Options | None = None,
    backend: str = "reference",
) -> Tensor:
    """With any number of spatial axes, and weights mixed on `backend`."""
    axes = templates.dim() - 3
    options = options or Options.default(axes)
    weights = _mixed(coefficients, templates, backend)
    if coefficients.shape[0] == 0:
        return _nothing(x, weights, bias, options)
    shared = x.dim() == axes + 2
    return torch.stack(
        [
            torch.convolution(x if shared else x[e], weight, _of_member(bias, e), *options)
            for e, weight in enumerate(weights.unbind())
        ]
    )


def _of_member(bias: Tensor | None, member: int) -> Tensor | None:
    return bias if bias is None or bias.dim() == 1 else bias[member]


def _mixed(coefficients: Tensor, templates: Tensor, backend: str) -> Tensor:
    """Weights in the memory format of the templates, also under torch.compile, where mix_templates does not ask."""
    if templates.dim() == 5 and _is_channels_last(templates[0]):
        return mix_templates(coefficients, templates.movedim(2, -1), backend=backend).movedim(-1, 2)
    return mix_templates(coefficients, templates, backend=backend)


def _is_channels_last(t: Tensor) -> bool:
    """Of one weight; torch.func.vmap has no `is_contiguous` of a memory format."""
    return not t.is_contiguous() and t.movedim(1, -1).is_contiguous()


def _nothing(x: Tensor, weights: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """The result of no members, on which all arguments have gradients of 0."""
    axes = len(options.stride)
    outputs = weights.shape[2] * options.groups if options.transposed else weights.shape[1]
    sizes = output_sizes(x.shape[-axes:], weights.shape[-axes:], options)
    result = x.new_zeros((0, x.shape[-axes - 2], outputs, *sizes)) + (x.sum() + weights.sum())
    return result if bias is None else result + bias.sum()
