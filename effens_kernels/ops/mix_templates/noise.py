"""mix_with_noise_: samples of a Gaussian with low-rank and diagonal covariance, made where their noise is."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _dispatch
from .._checks import check_alike, check_tensor, reject
from .autograd import kernels

OP = "mix_with_noise_"


def mix_with_noise_(
    noise: Tensor, sigma: Tensor, coefficients: Tensor, templates: Tensor, *, backend: str | None = None
) -> Tensor:
    r"""Turn noise into mixtures of templates with a diagonal term, in place.

    .. math:: z_m \leftarrow \sum_{t=1}^{T} \alpha_{mt} \, T_t + \sigma \circ z_m

    With standard normal z and, of each row of coefficients, 1 for a mean and normal numbers for deviations from it,
    these are samples of a Gaussian whose covariance is of low rank plus diagonal (Maddox et al. 2019, "A Simple
    Baseline for Bayesian Uncertainty in Deep Learning", equation 1).  One pass reads templates, sigma and noise and
    writes the samples over the noise.  A coefficient of 1 beside zeros, and sigma 0, give the template itself.

    Args:
        noise: `[M, N]`, contiguous; overwritten.
        sigma: `[N]`.
        coefficients: `[M, T]`.
        templates: `[T, N]`.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `noise`.

    All tensors share one dtype (float32, float16, bfloat16, float64) and one device.  Sums are accumulated in float32
    at least, without TF32.  There is no derivative, and autocast changes nothing.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: shapes or devices that do not fit; noise that is not contiguous; an argument that autograd follows;
            unknown backend; a backend that cannot run.

    Example:
        >>> import torch
        >>> mean, spread = torch.randn(1, 10), torch.zeros(10)
        >>> samples = mix_with_noise_(torch.randn(3, 10), spread, torch.ones(3, 1), mean)
        >>> torch.equal(samples, mean.expand(3, 10))
        True
    """
    arguments = {"noise": noise, "sigma": sigma, "coefficients": coefficients, "templates": templates}
    for name, t in arguments.items():
        check_tensor(OP, name, t)
        check_alike(OP, "noise", noise, name, t)
        if torch.is_grad_enabled() and t.requires_grad:
            reject(OP, name, "without requires_grad (there is no derivative), or called under torch.no_grad()", t)
    if noise.dim() != 2 or not noise.is_contiguous():
        reject(OP, "noise", "[M, N], contiguous", f"{list(noise.shape)} of strides {noise.stride()}")
    rows, columns = noise.shape
    if sigma.shape != (columns,):
        reject(OP, "sigma", f"[N={columns}]", sigma)
    if templates.dim() != 2 or templates.shape[0] == 0 or templates.shape[1] != columns:
        reject(OP, "templates", f"[T, N={columns}] of at least one template", templates)
    if coefficients.shape != (rows, templates.shape[0]):
        reject(OP, "coefficients", f"[M={rows}, T={templates.shape[0]}]", coefficients)
    chosen = _dispatch.select(_dispatch.Problem(OP, noise.device.type, noise.dtype), backend)
    kernels(chosen).mix_with_noise_(noise, sigma, coefficients, templates)
    return noise
