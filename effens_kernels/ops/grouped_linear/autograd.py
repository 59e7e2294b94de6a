"""grouped_linear's schemas, shape rules and derivatives, over the fwd and bwd of any kernel backend.

With z_e = x_e W_e^T + b_e, y = a(z), and g = dL/dy * a'(z):

    dx_e = g_e W_e  (summed over e where x is shared)      dW_e = g_e^T x_e      db_e = sum_b g_e

`saved` is what a' is a function of (see `_activations`): y, z, or an empty tensor.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._activations import ACTIVATIONS, saves_preactivation
from .._registration import is_plain_eager, needs_grad, register, register_derivative
from . import cuda, native


def kernels(backend: str) -> ModuleType:
    """The module whose fwd and bwd run on `backend`; Triton's at first use, since Triton takes long to import."""
    if backend != "triton":
        return cuda if backend == "cuda" else native
    from . import triton

    return triton


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    if is_plain_eager(x, weight, bias):
        return apply_plain(x, weight, bias, activation, backend)
    grad = needs_grad(x, weight, bias)
    return fwd_op(x, weight, bias, activation, grad and saves_preactivation(activation), backend)[0]


def apply_plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    """On plain tensors (see `is_plain_eager`)."""
    if needs_grad(x, weight, bias):
        outputs = GroupedLinear.apply(x, weight, bias, activation, backend)
        return outputs[0] if saves_preactivation(activation) else outputs
    return kernels(backend).fwd(x, weight, bias, activation, False)[0]


class GroupedLinear(torch.autograd.Function):
    """The eager route: ctx style, which costs a quarter of a registered rule per call.

    Where the derivative needs z, z is a second output, so that second derivatives see what it depends on.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation, backend):
        save_preactivation = saves_preactivation(activation)
        y, z = kernels(backend).fwd(x, weight, bias, activation, save_preactivation)
        ctx.save_for_backward(x, weight, *_saved(activation, y, z))
        ctx.set_materialize_grads(False)
        ctx.activation, ctx.backend = activation, backend
        return (y, z) if save_preactivation else y

    @staticmethod
    def backward(ctx, grad_y, grad_z=None):
        x, weight, *saved = ctx.saved_tensors
        if grad_z is None and grad_y is not None and not torch.is_grad_enabled() and is_plain_eager(grad_y):
            need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
            arguments = grad_y, x, weight, saved[0] if saved else x, ctx.activation, need_x, need_weight, need_bias
            dx, dweight, dbias = kernels(ctx.backend).bwd(*arguments)  # where nothing is saved, `saved` is not read
            return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, None, None
        return *_derivative(ctx, grad_y, grad_z, x, weight, saved), None, None


def _derivative(ctx, grad_y, grad_z, x, weight, saved):
    """(dx, dweight, dbias).  grad_z arrives only in second derivatives, where bwd_op was a function of z."""
    need = ctx.needs_input_grad[:3]
    grads = (None, None, None)
    for grad, activation, extra in ((grad_y, ctx.activation, saved), (grad_z, None, ())):
        if grad is None:
            continue
        arguments = (grad, x, weight, *(extra or (_empty(x),)), activation, *need)
        if torch.is_grad_enabled() or not is_plain_eager(grad, x, weight):  # the op that records its own derivative
            more = bwd_op(*arguments, ctx.backend)
        else:
            more = kernels(ctx.backend).bwd(*arguments)
        grads = tuple((m if g is None else g + m) if n else None for g, m, n in zip(grads, more, need))
    return grads


def _saved(activation: str | None, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    saves = ACTIVATIONS[activation].saves
    return {"nothing": (), "output": (y,), "preactivation": (z,)}[saves]


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


# ---------------------------------------------------------------------------------------------- registered ops


def _run_fwd(x, weight, bias, activation, save_preactivation, backend):
    return kernels(backend).fwd(x, weight, bias, activation, save_preactivation)


def _run_bwd(grad, x, weight, saved, activation, need_x, need_weight, need_bias, backend):
    return kernels(backend).bwd(grad, x, weight, saved, activation, need_x, need_weight, need_bias)


def _fake_fwd(x, weight, bias, activation, save_preactivation, backend):
    shape = (weight.shape[0], x.shape[-2], weight.shape[1])
    return x.new_empty(shape), x.new_empty(shape if save_preactivation else 0)


def _fake_bwd(grad, x, weight, saved, activation, need_x, need_weight, need_bias, backend):
    return (
        torch.empty_like(x) if need_x else _empty(x),
        weight.new_empty(weight.shape) if need_weight else _empty(x),
        weight.new_empty(weight.shape[:2]) if need_bias else _empty(x),
    )


fwd_op = register(
    "grouped_linear_fwd(Tensor x, Tensor weight, Tensor? bias, str? activation, bool save_preactivation, "
    "str backend) -> (Tensor y, Tensor z)",
    _run_fwd,
    _fake_fwd,
)
bwd_op = register(
    "grouped_linear_bwd(Tensor grad, Tensor x, Tensor weight, Tensor saved, str? activation, bool need_x, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _run_bwd,
    _fake_bwd,
)


def _fwd_setup(ctx, inputs, output):
    x, weight, bias, ctx.activation, save_preactivation, ctx.backend = inputs
    ctx.recompute = saves_preactivation(ctx.activation) and not save_preactivation
    ctx.save_for_backward(x, weight, *((bias,) if ctx.recompute else _saved(ctx.activation, *output)))
    ctx.set_materialize_grads(False)


def _fwd_derivative(ctx, grad_y, grad_z):
    x, weight, *saved = ctx.saved_tensors
    if ctx.recompute:
        saved = [fwd_op(x, weight, *saved, None, False, ctx.backend)[0]]
    if grad_z is not None and grad_z.numel() == 0:
        grad_z = None
    return *_derivative(ctx, grad_y, grad_z, x, weight, saved), None, None, None


def _bwd_setup(ctx, inputs, output):
    grad, x, weight, saved, ctx.activation, ctx.need_x, ctx.need_weight, ctx.need_bias, ctx.backend = inputs
    ctx.save_for_backward(grad, x, weight, saved)
    ctx.set_materialize_grads(False)


def _bwd_derivative(ctx, ddx, ddweight, ddbias):
    """Second derivative: with v = d(ddx . dx + ddweight . dW + ddbias . db)/dg, everything is again this op."""
    grad, x, weight, saved = ctx.saved_tensors
    slope = ACTIVATIONS[ctx.activation].slope(saved) if saved.numel() else None
    ddx = ddx if ctx.need_x else None
    ddweight = ddweight if ctx.need_weight else None
    ddbias = ddbias if ctx.need_bias else None

    def linear(*args):
        return fwd_op(*args, None, False, ctx.backend)[0]

    def derivative(g, x, weight, need_x, need_weight):
        return bwd_op(g, x, weight, _empty(x), None, need_x, need_weight, False, ctx.backend)

    terms = []
    if ddx is not None:
        terms.append(linear(ddx, weight, ddbias))
    elif ddbias is not None:
        terms.append(ddbias[:, None, :].expand_as(grad))
    if ddweight is not None:
        terms.append(linear(x, ddweight, None))
    if not terms:
        return (None,) * 9
    v = sum(terms[1:], terms[0])
    g = grad if slope is None else grad * slope
    grad_x = derivative(g, x, ddweight, True, False)[0] if ddweight is not None else None
    grad_weight = derivative(g, ddx, weight, False, True)[1] if ddx is not None else None
    grad_saved = None if slope is None else v * grad * ACTIVATIONS[ctx.activation].curvature(saved)
    grad_grad = v if slope is None else v * slope
    return grad_grad, grad_x, grad_weight, grad_saved, None, None, None, None, None


register_derivative(fwd_op, _fwd_setup, _fwd_derivative)
register_derivative(bwd_op, _bwd_setup, _bwd_derivative)
