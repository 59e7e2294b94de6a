"""mix_templates in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

from math import prod

from torch import Tensor


def mix_templates(coefficients: Tensor, templates: Tensor) -> Tensor:
    """[*, T] and [T, *shape] to [*, *shape]."""
    leading, shape, count = coefficients.shape[:-1], templates.shape[1:], templates.shape[0]
    mixed = coefficients.reshape(prod(leading), count) @ templates.reshape(count, prod(shape))
    return mixed.view(*leading, *shape)
