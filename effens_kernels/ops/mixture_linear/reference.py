"""mixture_linear in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

from torch import Tensor

from ..grouped_linear import reference as _linear
from ..mix_templates import reference as _mixing


def mixture_linear(
    x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return _linear.grouped_linear(x, _mixing.mix_templates(coefficients, templates), bias, activation)
