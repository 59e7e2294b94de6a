"""mix_templates on the CUDA C++ kernels of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from ... import _native


def fwd(coefficients: Tensor, templates: Tensor) -> Tensor:
    return _native.cuda_ops.mix_templates_fwd.default(coefficients, templates)


def mix_with_noise_(noise: Tensor, sigma: Tensor, coefficients: Tensor, templates: Tensor) -> None:
    _native.cuda_ops.mix_with_noise_.default(noise, sigma, coefficients, templates)


def bwd(
    grad: Tensor, coefficients: Tensor, templates: Tensor, need_coefficients: bool, need_templates: bool
) -> tuple[Tensor, Tensor]:
    return _native.cuda_ops.mix_templates_bwd.default(grad, coefficients, templates, need_coefficients, need_templates)
