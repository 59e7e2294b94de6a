"""ensemble_mlp's derivatives.

Plain eager tensors whose parameters all need gradients take one autograd node over the whole-model forward and
backward of the CPU engine or, for layers that fit them, of the CUDA kernels.  Everything else (torch.compile,
torch.func, frozen layers, second derivatives, Triton) is the chain of grouped_linear, which carries the registered
rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ... import _dispatch
from .._activations import ACTIVATIONS
from .._differentiated import differentiated, must_be_seen
from ..grouped_linear.autograd import FORM
from . import cuda, native
from .reference import layers


def apply_plain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
    backend: str,
) -> Tensor:
    """On plain tensors (see `plain_backend`)."""
    if x.dim() == 2 and weights[0].shape[0] == 1:
        trunk = next((n for n, weight in enumerate(weights) if weight.shape[0] != 1), len(weights))
        if trunk < len(weights):  # members part from one row of hidden values
            h = apply_plain(x, weights[:trunk], biases[:trunk], activation, activation, backend)
            return apply_plain(h.squeeze(0), weights[trunk:], biases[trunk:], activation, out_activation, backend)
    if backend == "cuda":
        widths = [x.shape[-1], *(weight.shape[1] for weight in weights)]
        if not _dispatch.takes_mlp(widths, x.dtype, x.device):
            return chain(x, weights, biases, activation, out_activation, backend)
    if torch.is_grad_enabled():
        trained = [p.requires_grad for p in (*weights, *biases) if p is not None]
        if all(trained):
            return EnsembleMLP.apply(x, activation, out_activation, backend, len(weights), *weights, *biases)
        if x.requires_grad or any(trained):
            return chain(x, weights, biases, activation, out_activation, backend)
    return kernels(backend).fwd(x, weights, biases, activation, out_activation, False)[0]


def kernels(backend: str) -> ModuleType:
    return cuda if backend == "cuda" else native


def chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
    backend: str,
) -> Tensor:
    def linear(x, weight, bias, activation):
        return FORM.apply(backend, activation, x, weight, bias)

    return layers(linear, x, weights, biases, activation, out_activation)


class EnsembleMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, out_activation, backend, depth, *parameters):
        weights, biases = parameters[:depth], parameters[depth:]
        y, hidden = kernels(backend).fwd(x, weights, biases, activation, out_activation, True)
        if ACTIVATIONS[out_activation].saves == "output":
            ctx.save_for_backward(x, hidden, *parameters, y)
        else:
            ctx.save_for_backward(x, hidden, *parameters)
        ctx.set_materialize_grads(False)
        ctx.options = activation, out_activation
        ctx.backend = backend
        ctx.depth = depth
        return y

    @staticmethod
    def backward(ctx, grad):
        depth = ctx.depth
        if grad is None:
            return (None,) * (5 + 2 * depth)
        x, hidden, *rest = ctx.saved_tensors
        weights, biases = rest[:depth], rest[depth : 2 * depth]
        need_x = ctx.needs_input_grad[0]
        if must_be_seen(grad):
            grads = differentiated(
                lambda x, *p: chain(x, p[:depth], p[depth:], *ctx.options, ctx.backend),
                (x, *weights, *biases),
                ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:],
                grad,
            )
            return grads[0], *(None,) * 4, *grads[1:]
        y = rest[2 * depth] if len(rest) > 2 * depth else grad  # without an activation it is not read
        dx, *grads = kernels(ctx.backend).bwd(grad, x, weights, y, hidden, *ctx.options, need_x)
        for n, bias in enumerate(biases, depth):
            if bias is None:
                grads[n] = None
        return dx if need_x else None, *(None,) * 4, *grads
