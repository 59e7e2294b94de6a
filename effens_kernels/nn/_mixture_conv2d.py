"""STAND-IN, to be deleted when `effens_kernels.ops.mixture_conv2d` is there: the same function in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import mix_templates


def mixture_conv2d(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    weights = mix_templates(coefficients, templates, backend=backend)
    images = x.unbind(0) if x.dim() == 5 else [x] * len(weights)
    biases = [None] * len(weights) if bias is None else bias.expand(len(weights), -1)
    how = stride, padding, dilation, groups
    return torch.stack([F.conv2d(x, w, b, *how) for x, w, b in zip(images, weights, biases)])
