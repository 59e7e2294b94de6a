"""ensemble_predict_regression: mean and variance of an ensemble of regression models, and what the variance is of."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

from ... import _dispatch
from .._checks import check_alike, check_tensor, reject
from . import autograd, batching, reference  # noqa: F401  (batching registers the vmap rules)

__all__ = ["RegressionPrediction", "ensemble_predict_regression"]


class RegressionPrediction(NamedTuple):
    r"""What :func:`ensemble_predict_regression` returns, each `[*batch]`.

    `mean`, the ensemble's prediction; `variance`, its uncertainty, which is the sum of `aleatoric`, the mean of the
    members' variances, and `epistemic`, the variance of their means.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ek.ensemble_predict_regression(torch.tensor([[1.0], [3.0]])).epistemic
        tensor([1.])
    """

    mean: Tensor
    variance: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def ensemble_predict_regression(
    means: Tensor, variances: Tensor | None = None, *, backend: str | None = None
) -> RegressionPrediction:
    r"""Mean and variance of an equal mixture of the members' predictions, by the law of total variance.

    .. math::
        \mu = \frac{1}{E} \sum_e \mu_e \qquad
        \sigma^2 = \underbrace{\frac{1}{E} \sum_e \sigma_e^2}_{\text{aleatoric}} +
                   \underbrace{\frac{1}{E} \sum_e (\mu_e - \mu)^2}_{\text{epistemic}}

    as in deep ensembles of networks that predict a mean and a variance (Lakshminarayanan et al. 2017, section 2.4).
    Differences from the mean are squared, not means subtracted from squares, so that a large common offset costs no
    precision and no variance is negative.

    Args:
        means: `[E, *batch]`; any strides.
        variances: None, for members that predict a mean alone, or `[E, *batch]`; not standard deviations.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        :class:`RegressionPrediction`: mean, variance, aleatoric (0 without variances) and epistemic, each `[*batch]`.
        float32, or float64 for float64.

    Both tensors share one dtype (float32, float16, bfloat16, float64) and one device.  An empty batch gives empty
    results.  Differentiable any number of times in both tensors; means and mean are what is kept for backward.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: no members; shapes or devices differ; unknown backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> means, variances = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.5, 0.5], [0.1, 0.1]])
        >>> found = ek.ensemble_predict_regression(means, variances)  # 2 members, 2 rows
        >>> found.mean, found.variance
        (tensor([2., 2.]), tensor([1.3000, 0.3000]))
    """
    op = "ensemble_predict_regression"
    check_tensor(op, "means", means)
    if means.dim() < 1:
        reject(op, "means", "[E, *batch]", means)
    members, *batch = means.shape
    if members == 0:
        reject(op, "means", "[E, *batch] of at least one member", means)
    if variances is not None:
        check_tensor(op, "variances", variances)
        check_alike(op, "means", means, "variances", variances)
        if variances.shape != means.shape:
            reject(op, "variances", f"{list(means.shape)} like means", variances)
    chosen = _dispatch.select(_dispatch.Problem(op, means.device.type, means.dtype), backend)
    columns = [t if t is None or len(batch) == 1 else t.reshape(members, prod(batch)) for t in (means, variances)]
    found = reference.fwd(*columns) if chosen == "reference" else autograd.apply(*columns, chosen)
    return RegressionPrediction(*(found if len(batch) == 1 else (t.view(batch) for t in found)))
