"""rank1_mlp's derivatives.

Plain eager tensors on a CPU whose parameters all need gradients take one autograd node over all layers.  Everything
else (torch.compile, torch.func, frozen layers, second derivatives, GPUs) is the chain of rank1_linear, which carries
the registered rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._activations import ACTIVATIONS
from .._differentiated import differentiated, must_be_seen
from ..rank1_linear.autograd import FORM
from . import native
from .reference import layers

Groups = Sequence[Sequence[Tensor | None]]  # weights, r, s and biases, of each layer


def apply_plain(x: Tensor, groups: Groups, activation: str | None, out_activation: str | None) -> Tensor:
    """On plain CPU tensors (see `takes_cpu_engine`)."""
    groups = (*groups[:3], [_per_member(bias, r) for bias, r in zip(groups[3], groups[1])])
    if torch.is_grad_enabled():
        trained = [t.requires_grad for group in groups for t in group if t is not None]
        if all(trained):
            return Rank1MLP.apply(x, activation, out_activation, *(t for group in groups for t in group))
        if x.requires_grad or any(trained):
            return chain(x, groups, activation, out_activation, "cpu")
    return native.fwd(x, *groups, activation, out_activation, False)[0]


def chain(x: Tensor, groups: Groups, activation: str | None, out_activation: str | None, backend: str) -> Tensor:
    def linear(x, weight, r, s, bias, activation):
        return FORM.apply(backend, activation, x, weight, r, s, _per_member(bias, r))

    return layers(linear, x, *groups, activation, out_activation)


class Rank1MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, out_activation, *parameters):
        y, *kept = native.fwd(x, *_groups(parameters), activation, out_activation, True)
        reads_y = ACTIVATIONS[out_activation].saves == "output"
        ctx.save_for_backward(x, *parameters, *kept, *([y] * reads_y))
        ctx.set_materialize_grads(False)
        ctx.options, ctx.count, ctx.reads_y = (activation, out_activation), len(parameters), reads_y
        return y

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * (3 + ctx.count)
        x, *tensors = ctx.saved_tensors
        parameters, kept = tensors[: ctx.count], tensors[ctx.count :]
        if must_be_seen(grad):
            grads = differentiated(
                lambda x, *parameters: chain(x, _groups(parameters), *ctx.options, "cpu"),
                (x, *parameters),
                ctx.needs_input_grad[:1] + ctx.needs_input_grad[3:],
                grad,
            )
            return grads[0], None, None, *grads[1:]
        y = kept.pop() if ctx.reads_y else grad  # not read
        need_x = ctx.needs_input_grad[0]
        dx, *grads = native.bwd(grad, x, *_groups(parameters)[:3], y, kept, *ctx.options, need_x)
        grads = [None if parameter is None else g for g, parameter in zip(grads, parameters)]
        return dx if need_x else None, None, None, *grads


def _groups(parameters: Sequence[Tensor | None]) -> Groups:
    depth = len(parameters) // 4
    return [parameters[n * depth : (n + 1) * depth] for n in range(4)]


def _per_member(bias: Tensor | None, r: Tensor) -> Tensor | None:
    """A shared bias as a view of all members', whose gradient torch sums."""
    return bias if bias is None or bias.dim() != 1 else bias.expand(r.shape[0], -1)
