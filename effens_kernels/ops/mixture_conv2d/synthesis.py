"""mixture_conv2d by synthesis: the weights of all members mixed at once, then PyTorch's convolution once per member.

With theta_e = sum_t alpha_et T_t, g = dL/dy and G_e = dL/dtheta_e from g_e and x_e:

    y_e = conv(x_e, theta_e) + b_e        dx_e from g_e and theta_e        db_e = sum g_e
    dalpha_et = <G_e, T_t>                dT_t = sum_e alpha_et G_e

theta, E times the size of a template, is not kept for backward: it is mixed again there, and only for dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _member_convolution
from .._convolution import Options
from .._registration import needs_grad
from ..mix_templates import flat
from ..mix_templates.autograd import kernels
from .reference import mixture_conv


def apply(
    x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None, options: Options, backend: str
) -> Tensor:
    """On plain tensors (see `is_plain_eager`) of at least one member; `backend` is that of mixing, bias [E, O]."""
    if needs_grad(x, coefficients, templates, bias):
        return MixtureConv.apply(x, coefficients, templates, bias, options, backend)
    return fwd(x, coefficients, templates, bias, options, backend)


def fwd(
    x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None, options: Options, backend: str
) -> Tensor:
    columns, shaped = flat(templates)
    weights = shaped(kernels(backend).fwd(coefficients, columns))
    return _member_convolution.forward(x, weights, len(coefficients), bias, options)


def bwd(
    grad: Tensor,
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    options: Options,
    backend: str,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, coefficients, templates and the bias (as [E, O]); None where `need` has False."""
    need_x, *need_mixing, need_bias = need
    need_weights = any(need_mixing)
    members = _member_convolution.Backward(grad, x, options, need_x, need_weights, need_bias)
    columns, shaped = flat(templates)
    if need_x:
        weights = shaped(kernels(backend).fwd(coefficients, columns))
    else:  # not read
        weights = templates[:1].expand(len(coefficients), *templates.shape[1:])
    dcoefficients = dtemplates = None
    if need_weights:
        products = columns.new_empty(len(coefficients), columns.shape[1])  # G
        for e, (weight, product) in enumerate(zip(weights, shaped(products))):
            product.copy_(members.member(e, weight))
        del weights, weight
        dcoefficients, dtemplates = kernels(backend).bwd(products, coefficients, columns, *need_mixing)
    elif need_x:
        for e, weight in enumerate(weights):
            members.member(e, weight)
    return (
        members.dx(),
        dcoefficients if need_mixing[0] else None,
        shaped(dtemplates) if need_mixing[1] else None,
        members.dbias(),
    )


class MixtureConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, coefficients, templates, bias, options, backend):
        ctx.save_for_backward(x, coefficients, templates)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        return fwd(x, coefficients, templates, bias, options, backend)

    @staticmethod
    def backward(ctx, grad):
        need, options, backend = ctx.needs_input_grad[:4], ctx.options, ctx.backend
        grads = _member_convolution.derivatives(
            grad,
            ctx.saved_tensors,
            need,
            lambda *tensors: bwd(*tensors, options, backend, need),
            lambda *tensors: mixture_conv(*tensors, None, options, backend),
        )
        return *grads, None, None
