"""mixture_linear in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

from torch import Tensor

from ..grouped_linear import reference as _linear
from ..mix_templates import reference as _mixing


def mixture_linear(
    x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(coefficients.shape[0], -1)
    return _linear.grouped_linear(x, _mixing.mix_templates(coefficients, templates), bias, activation)
