"""mix_templates in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

from math import prod

from torch import Tensor


def mix_templates(coefficients: Tensor, templates: Tensor) -> Tensor:
    """[*, T] and [T, *shape] to [*, *shape]."""
    leading, shape, count = coefficients.shape[:-1], templates.shape[1:], templates.shape[0]
    mixed = coefficients.reshape(prod(leading), count) @ templates.reshape(count, prod(shape))
    return mixed.view(*leading, *shape)


def fwd(coefficients: Tensor, templates: Tensor) -> Tensor:
    """[M, T] and [T, N] to [M, N]: what each backend has, for ops that run on any of them."""
    return coefficients @ templates


def mix_with_noise_(noise: Tensor, sigma: Tensor, coefficients: Tensor, templates: Tensor) -> None:
    """Template by template: a product of matrices might round to TF32, and a mean of coefficient 1 with it."""
    half = noise.dtype.itemsize == 2
    mixed, coefficients = (noise.float(), coefficients.float()) if half else (noise, coefficients)
    mixed.mul_(sigma)
    for coefficient, template in zip(coefficients.unbind(1), templates):
        mixed.addcmul_(coefficient.unsqueeze(1), template.to(mixed.dtype))
    if half:
        noise.copy_(mixed)


def bwd(
    grad: Tensor, coefficients: Tensor, templates: Tensor, need_coefficients: bool, need_templates: bool
) -> tuple[Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return (
        grad @ templates.mT if need_coefficients else nothing,
        coefficients.mT @ grad if need_templates else nothing,
    )
