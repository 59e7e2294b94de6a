"""rank1_conv2d by scales folded into the weight: PyTorch's convolution once per member, on images as they are.

With W'_e = s_e W r_e, of which a few members' exist at a time, and g = dL/dy:

    y_e = conv(x_e, W'_e) + b_e        dx_e from g_e and W'_e        G_e from g_e and x_e, as dL/dW'_e
    dW = sum_e s_e G_e r_e    dr_e = sum s_e W G_e over outputs    ds_e = sum r_e W G_e over inputs    db_e = sum g_e

The last line is work on arrays of the weight's size, in float32 at least.  In it the weight is [groups, P, Q K]: of
its first two axes the second (Q) is in every group, K runs over the kernel, and what lies in memory last is last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _member_convolution
from .._convolution import Options
from .._registration import needs_grad
from .reference import rank1_conv

# Numbers of folded weight that exist at a time, if it takes more than one member to reach them: 1 MiB of float32,
# which an L2 cache holds.
CHUNK = 1 << 18


class Kernel:
    """A shared weight as [groups, P, Q K] in the dtype of sums, and scales that fit it."""

    def __init__(self, weight: Tensor, options: Options) -> None:
        self.shape, self.dtype, self.groups = weight.shape, weight.dtype, options.groups
        self.transposed = options.transposed
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        # torch.convolution takes its memory format from the weight too, so folded weights lie as the weight does.
        self.channels_last = 1 != weight.shape[1] == weight.stride(-1) and weight.movedim(1, -1).is_contiguous()
        self.matrix = self.flat(weight.to(self.wide)).unflatten(0, (self.groups, -1))

    def flat(self, t: Tensor) -> Tensor:
        """[..., Q, kernel] as [..., Q K]."""
        axes = len(self.shape) - 2
        return (t.movedim(-axes - 1, -1) if self.channels_last else t).flatten(-axes - 1)

    def unflat(self, t: Tensor) -> Tensor:
        """[..., Q K] as [..., Q, kernel]."""
        if self.channels_last:
            return t.unflatten(-1, (*self.shape[2:], self.shape[1])).movedim(-1, 1 - len(self.shape))
        return t.unflatten(-1, self.shape[1:])

    def scales(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """[E, groups, P, 1] and [E, groups, 1, Q K]: factors of the weight's first and second axis."""
        outer, inner = (r, s) if self.transposed else (s, r)
        outer = outer.to(self.wide).unflatten(1, (self.groups, -1)).unsqueeze(-1)
        inner = inner.to(self.wide).unflatten(1, (self.groups, 1, -1))[(..., *(None,) * (len(self.shape) - 2))]
        return outer, self.flat(inner.expand(*inner.shape[:4], *self.shape[2:]))

    def fold(self, outer: Tensor, inner: Tensor) -> Tensor:
        """Weights [n, *weight.shape] of the members whose scales are given, rounded once."""
        folded = self.matrix * outer
        return self.unflat(folded.mul_(inner).to(self.dtype).flatten(1, 2))

    def chunks(self, members: int) -> list[slice]:
        step = max(1, CHUNK // max(1, self.matrix.numel()))
        return [slice(start, min(start + step, members)) for start in range(0, members, step)]


def apply(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """On plain tensors (see `is_plain_eager`) of at least one member."""
    if needs_grad(x, weight, r, s, bias):
        return Rank1Conv.apply(x, weight, r, s, bias, options)
    return fwd(x, weight, r, s, bias, options)


def fwd(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    kernel = Kernel(weight, options)
    outer, inner = kernel.scales(r, s)
    weights = (folded for chunk in kernel.chunks(len(r)) for folded in kernel.fold(outer[chunk], inner[chunk]))
    return _member_convolution.forward(x, weights, len(r), bias, options)


def bwd(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, options: Options, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, r, s and the bias (as [E, O]); None where `need` has False."""
    need_x, need_weight, need_r, need_s, need_bias = need
    need_kernel = need_weight or need_r or need_s
    kernel = Kernel(weight, options)
    scales = kernel.scales(r, s)
    members = _member_convolution.Backward(grad, x, options, need_x, need_kernel, need_bias)
    dweight = torch.zeros_like(kernel.matrix) if need_weight else None
    douter, dinner = [], []
    for chunk in kernel.chunks(len(r)) if need_x or need_kernel else ():
        outer, inner = (t[chunk] for t in scales)
        weights = kernel.fold(outer, inner) if need_x else [weight] * len(outer)
        products = outer.new_empty(len(outer), *kernel.matrix.shape) if need_kernel else None  # G
        for e, folded in enumerate(weights, chunk.start):
            product = members.member(e, folded)
            if need_kernel:
                kernel.unflat(products[e - chunk.start].flatten(0, 1)).copy_(product)
        if need_r or need_s:
            weighted = products * kernel.matrix
            douter.append(weighted @ inner.mT)
            dinner.append(outer.mT @ weighted)
        if need_weight:
            products.mul_(outer)
            for product, scale in zip(products, inner):
                dweight.addcmul_(product, scale)
    dr = ds = None
    if need_r or need_s:
        douter = torch.cat(douter).flatten(1)
        dinner = kernel.unflat(torch.cat(dinner)).flatten(4).sum(-1).flatten(1)
        dr, ds = (douter, dinner) if options.transposed else (dinner, douter)
    return (
        members.dx(),
        kernel.unflat(dweight.flatten(0, 1)).to(weight.dtype) if need_weight else None,
        dr.to(r.dtype) if need_r else None,
        ds.to(s.dtype) if need_s else None,
        members.dbias(),
    )


class Rank1Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, options):
        ctx.save_for_backward(x, weight, r, s)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return fwd(x, weight, r, s, bias, options)

    @staticmethod
    def backward(ctx, grad):
        need, options = ctx.needs_input_grad[:5], ctx.options
        grads = _member_convolution.derivatives(
            grad,
            ctx.saved_tensors,
            need,
            lambda *tensors: bwd(*tensors, options, need),
            lambda *tensors: rank1_conv(*tensors, None, options),
        )
        return *grads, None
