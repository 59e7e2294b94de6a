"""ensemble_predict's schemas, shape rules and derivatives, of logits [E, B, C].

With p_e = softmax(z_e), q their mean, g the gradients of results by name and a comma for "of class c":

    v_e = (g_mean - (g_entropy + g_mutual) log q - (g_expected - g_mutual) log p_e + 2 g_variance (p_e - q)) / E
    dz_e = p_e (v_e - <p_e, v_e>)

where what is the same for all classes, as the 1 in the derivative of p log p, falls out of the difference.  Only the
logits and q are kept.  Gradients that are not wanted are empty tensors.
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


def apply(logits: Tensor, backend: str) -> Results:
    if not is_plain_eager(logits):
        return fwd_op(logits, backend)
    if needs_grad(logits):
        return EnsemblePredict.apply(logits, backend)
    return kernels(backend).fwd(logits)


class EnsemblePredict(torch.autograd.Function):
    """The eager route: ctx style, which costs a quarter of a registered rule per call."""

    @staticmethod
    def forward(ctx, logits, backend):
        results = kernels(backend).fwd(logits)
        _setup(ctx, (logits, backend), results)
        return results

    @staticmethod
    def backward(ctx, *grads):
        return _derivative(ctx, *grads)


def _fake_fwd(logits: Tensor, backend: str) -> Results:
    _, batch, classes = logits.shape
    like = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    return *(like.new_empty(batch, classes) for _ in range(2)), *(like.new_empty(batch) for _ in range(4))


fwd_op = register(
    "ensemble_predict_fwd(Tensor logits, str backend) -> (Tensor mean_probs, Tensor variance, Tensor entropy, "
    "Tensor expected_entropy, Tensor mutual_information, Tensor disagreement)",
    lambda logits, backend: kernels(backend).fwd(logits),
    _fake_fwd,
)
bwd_op = register(
    "ensemble_predict_bwd(Tensor logits, Tensor mean_probs, Tensor grad_mean, Tensor grad_variance, "
    "Tensor grad_entropy, Tensor grad_expected, Tensor grad_mutual, str backend) -> Tensor",
    lambda *arguments: kernels(arguments[-1]).bwd(*arguments[:-1]),
    lambda logits, *rest: logits.new_empty(logits.shape),
)


def _setup(ctx, inputs, results):
    logits, ctx.backend = inputs
    ctx.save_for_backward(logits, results[0])
    ctx.mark_non_differentiable(results[5])
    ctx.set_materialize_grads(False)


def _derivative(ctx, *grads):
    grads = grads[:5]  # none of the disagreement
    if all(g is None for g in grads):
        return None, None
    logits, mean_probs = ctx.saved_tensors
    seen = any(g is not None and must_be_seen(g) for g in grads) or not is_plain_eager(logits, mean_probs)
    grads = [mean_probs.new_empty(0) if g is None else g.contiguous() for g in grads]
    if seen:  # the op that records its own derivative
        return bwd_op(logits, mean_probs, *grads, ctx.backend), None
    return kernels(ctx.backend).bwd(logits, mean_probs, *grads), None


def _bwd_setup(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _bwd_derivative(ctx, grad):
    """That of the composition: second derivatives are too rare for kernels of their own."""
    return *pullback(reference.bwd, ctx.saved_tensors, ctx.needs_input_grad[:7], grad), None


register_derivative(fwd_op, _setup, _derivative)
register_derivative(bwd_op, _bwd_setup, _bwd_derivative)
