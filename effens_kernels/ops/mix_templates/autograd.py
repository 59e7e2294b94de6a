"""mix_templates' schemas, shape rules and derivatives, of rows of coefficients [M, T] and flat templates [T, N].

With g = dL/dtheta [M, N]:

    dcoefficients = g templates^T        dtemplates = coefficients^T g

Both are linear in each of their arguments, so second derivatives are made of fwd and bwd again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend_modules import backend_modules
from .._registration import is_plain_eager, needs_grad, register, register_derivative

kernels = backend_modules(__package__)


def apply(coefficients: Tensor, templates: Tensor, backend: str) -> Tensor:
    if not is_plain_eager(coefficients, templates):
        return fwd_op(coefficients, templates, backend)
    if needs_grad(coefficients, templates):
        return MixTemplates.apply(coefficients, templates, backend)
    return kernels(backend).fwd(coefficients, templates)


class MixTemplates(torch.autograd.Function):
    """The eager route: ctx style, which costs a quarter of a registered rule per call."""

    @staticmethod
    def forward(ctx, coefficients, templates, backend):
        ctx.save_for_backward(coefficients, templates)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return kernels(backend).fwd(coefficients, templates)

    @staticmethod
    def backward(ctx, grad):
        return *_derivative(ctx, grad, ctx.needs_input_grad[:2]), None


fwd_op = register(
    "mix_templates_fwd(Tensor coefficients, Tensor templates, str backend) -> Tensor",
    lambda coefficients, templates, backend: kernels(backend).fwd(coefficients, templates),
    lambda coefficients, templates, backend: templates.new_empty(coefficients.shape[0], templates.shape[1]),
)
bwd_op = register(
    "mix_templates_bwd(Tensor grad, Tensor coefficients, Tensor templates, bool need_coefficients, "
    "bool need_templates, str backend) -> (Tensor grad_coefficients, Tensor grad_templates)",
    lambda *arguments: kernels(arguments[-1]).bwd(*arguments[:-1]),
    lambda grad, coefficients, templates, need_coefficients, need_templates, backend: (
        grad.new_empty(coefficients.shape if need_coefficients else 0),
        grad.new_empty(templates.shape if need_templates else 0),
    ),
)


def _setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _derivative(ctx, grad, need):
    """Gradients of coefficients and templates."""
    if grad is None:
        return None, None
    plain = not torch.is_grad_enabled() and is_plain_eager(grad, *ctx.saved_tensors)
    if plain:
        grads = kernels(ctx.backend).bwd(grad, *ctx.saved_tensors, *need)
    else:  # the op that records its own derivative
        grads = bwd_op(grad, *ctx.saved_tensors, *need, ctx.backend)
    return tuple(g if n else None for g, n in zip(grads, need))


def _bwd_setup(ctx, inputs, output):
    grad, coefficients, templates, *ctx.need, ctx.backend = inputs
    ctx.save_for_backward(grad, coefficients, templates)
    ctx.set_materialize_grads(False)


def _bwd_derivative(ctx, *directions):
    """Of <dc, g T^T> + <dt, C^T g>, which is <g, dc T + C dt>."""
    grad, coefficients, templates = ctx.saved_tensors
    dc, dt = (d if n else None for d, n in zip(directions, ctx.need))
    need_grad, need_coefficients, need_templates = ctx.needs_input_grad[:3]
    terms = []
    if need_grad:
        terms += [fwd_op(dc, templates, ctx.backend)] if dc is not None else []
        terms += [fwd_op(coefficients, dt, ctx.backend)] if dt is not None else []
    need = need_coefficients and dt is not None, need_templates and dc is not None
    grads = (None, None)
    if any(need):
        left, right = (coefficients if dc is None else dc), (templates if dt is None else dt)
        grads = bwd_op(grad, left, right, *need, ctx.backend)
    return (sum(terms[1:], terms[0]) if terms else None), *(g if n else None for g, n in zip(grads, need)), *(None,) * 3


register_derivative(fwd_op, _setup, lambda ctx, grad: (*_derivative(ctx, grad, ctx.needs_input_grad[:2]), None))
register_derivative(bwd_op, _bwd_setup, _bwd_derivative)
