"""ensemble_predict_regression's schemas, shape rules and derivatives, of means and variances [E, N].

With mu the mean of the members' means, and g the gradients of results by name:

    dmeans_e = (g_mean + 2 (g_variance + g_epistemic) (mu_e - mu)) / E
    dvariances_e = (g_variance + g_aleatoric) / E

Only the means and mu are kept.  Gradients that are not wanted are empty tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend_modules import backend_modules
from .._differentiated import must_be_seen, pullback
from .._registration import is_plain_eager, needs_grad, register, register_derivative
from . import reference
from .reference import Results

kernels = backend_modules(__package__)


def apply(means: Tensor, variances: Tensor | None, backend: str) -> Results:
    if not is_plain_eager(means, variances):
        return fwd_op(means, variances, backend)
    if needs_grad(means, variances):
        return EnsemblePredictRegression.apply(means, variances, backend)
    return kernels(backend).fwd(means, variances)


class EnsemblePredictRegression(torch.autograd.Function):
    """The eager route: ctx style, which costs a quarter of a registered rule per call."""

    @staticmethod
    def forward(ctx, means, variances, backend):
        results = kernels(backend).fwd(means, variances)
        _setup(ctx, (means, variances, backend), results)
        return results

    @staticmethod
    def backward(ctx, *grads):
        return _derivative(ctx, *grads)


def _fake_fwd(means: Tensor, variances: Tensor | None, backend: str) -> Results:
    dtype = torch.promote_types(means.dtype, torch.float32)
    return tuple(means.new_empty(means.shape[1], dtype=dtype) for _ in range(4))


def _fake_bwd(means: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *_, need_means, need_variances, _ = rest
    return tuple(means.new_empty(means.shape if need else 0) for need in (need_means, need_variances))


fwd_op = register(
    "ensemble_predict_regression_fwd(Tensor means, Tensor? variances, str backend) -> (Tensor mean, Tensor variance, "
    "Tensor aleatoric, Tensor epistemic)",
    lambda means, variances, backend: kernels(backend).fwd(means, variances),
    _fake_fwd,
)
bwd_op = register(
    "ensemble_predict_regression_bwd(Tensor means, Tensor mean, Tensor grad_mean, Tensor grad_variance, "
    "Tensor grad_aleatoric, Tensor grad_epistemic, bool need_means, bool need_variances, str backend) "
    "-> (Tensor grad_means, Tensor grad_variances)",
    lambda *arguments: kernels(arguments[-1]).bwd(*arguments[:-1]),
    _fake_bwd,
)


def _setup(ctx, inputs, results):
    means, _, ctx.backend = inputs
    ctx.save_for_backward(means, results[0])
    ctx.set_materialize_grads(False)


def _derivative(ctx, *grads):
    need = ctx.needs_input_grad[:2]
    if all(g is None for g in grads):
        return None, None, None
    means, mean = ctx.saved_tensors
    seen = any(g is not None and must_be_seen(g) for g in grads) or not is_plain_eager(means, mean)
    grads = [mean.new_empty(0) if g is None else g.contiguous() for g in grads]
    if seen:  # the op that records its own derivative
        found = bwd_op(means, mean, *grads, *need, ctx.backend)
    else:
        found = kernels(ctx.backend).bwd(means, mean, *grads, *need)
    return *(g if n else None for g, n in zip(found, need)), None


def _bwd_setup(ctx, inputs, output):
    *tensors, need_means, need_variances, _ = inputs
    ctx.need = need_means, need_variances
    ctx.save_for_backward(*tensors)


def _bwd_derivative(ctx, *grads):
    """That of the composition: second derivatives are too rare for kernels of their own."""
    tensors = ctx.saved_tensors
    found = pullback(lambda *t: reference.bwd(*t, *ctx.need), tensors, ctx.needs_input_grad[:6], grads)
    return *found, *(None,) * 3


register_derivative(fwd_op, _setup, _derivative)
register_derivative(bwd_op, _bwd_setup, _bwd_derivative)
