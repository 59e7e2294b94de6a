"""rank1_conv2d in plain PyTorch: the oracle of the tests, and what runs where something must see the operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .._convolution import Options


def rank1_conv(
    x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None = None, options: Options | None = None
) -> Tensor:
    """Scaled images of all members through one convolution, with any number of spatial axes."""
    axes = weight.dim() - 2
    options = options or Options.default(axes)
    shape = (r.shape[0], x.shape[-axes - 2])  # E, B
    x = x * channels(r, axes)
    y = torch.convolution(x.flatten(0, 1), weight, None, *options).unflatten(0, shape) * channels(s, axes)
    return y if bias is None else y + channels(bias, axes)


def channels(values: Tensor, axes: int) -> Tensor:
    """[E, C] or [C] as [(E,) 1, C, 1, ...], which multiplies images."""
    return values.unsqueeze(-2)[(..., *(None,) * axes)]
