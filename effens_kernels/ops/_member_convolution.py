"""A convolution per member, each with a weight of its own: PyTorch's, member by member, on images as they are.

    y_e = conv(x_e, W_e) + b_e        dx_e from g_e and W_e        G_e = dL/dW_e from g_e and x_e        db_e = sum g_e

with g = dL/dy.  Images are x [B, C, ...], the same for all members, or [E, B, C, ...].  On CPUs this was measured
faster than one grouped convolution of all members (`_dispatch.rank1_conv_route` has the figures).  Where weights come
from, and what becomes of G_e, is the op's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ._convolution import Options
from ._differentiated import differentiated, must_be_seen


def forward(x: Tensor, weights: Iterable[Tensor], members: int, bias: Tensor | None, options: Options) -> Tensor:
    """[E, B, O, ...] of at least one member; `bias` is [E, O]."""
    results = None
    for e, weight in enumerate(weights):
        y = torch.convolution(_images(x, weight, e), weight, None if bias is None else bias[e], *options)
        results = _store(results, y, e, members)
    return results


class Backward:
    """Gradients of images and bias, gathered as members are taken one after the other."""

    def __init__(
        self, grad: Tensor, x: Tensor, options: Options, need_x: bool, need_weight: bool, need_bias: bool
    ) -> None:
        self.grad, self.x, self.options = grad, x, options
        self.need_x, self.need_weight, self.need_bias = need_x, need_weight, need_bias
        self._dx: Tensor | None = None
        self._dbias: list[Tensor] = []

    def member(self, e: int, weight: Tensor) -> Tensor | None:
        """Take member `e`, in order: G_e, if needed.  Without `need_x` the values of `weight` are not read."""
        # oneDNN has the bias's gradient from the weight's; alone it is a sum.
        mask = [self.need_x, self.need_weight, self.need_weight and self.need_bias]
        arguments = self.grad[e], _images(self.x, weight, e), weight, self.grad.shape[2:3], *self.options, mask
        dx, product, dbias = torch.ops.aten.convolution_backward.default(*arguments)
        if self.need_x and self.x.dim() == weight.dim():  # shared
            wide = torch.promote_types(dx.dtype, torch.float32)
            self._dx = dx.to(wide) if self._dx is None else self._dx.add_(dx)
        elif self.need_x:
            self._dx = _store(self._dx, dx, e, len(self.grad))
        self._dbias.append(dbias)
        return product

    def dx(self) -> Tensor | None:
        return self._dx.to(self.x.dtype) if self.need_x else None

    def dbias(self) -> Tensor | None:
        """[E, O]."""
        if not self.need_bias:
            return None
        return torch.stack(self._dbias) if self.need_weight else _sums(self.grad)


def derivatives(
    grad: Tensor | None,
    tensors: Sequence[Tensor],
    need: Sequence[bool],
    kernels: Callable[..., tuple[Tensor | None, ...]],
    composition: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of `tensors` and, as [E, O], of the bias, each where `need` has True.

    They are `kernels(grad, *tensors)`, or where something must see PyTorch's operations, the derivatives of
    `composition(*tensors)`, which has no bias.
    """
    if grad is None:
        return (None,) * len(need)
    # Autocast is not for these sums, wherever backward is called.
    with torch.autocast(grad.device.type, enabled=False):
        if not must_be_seen(grad):
            return kernels(grad, *tensors)
        return *differentiated(composition, tensors, need[:-1], grad), _sums(grad) if need[-1] else None


def _sums(grad: Tensor) -> Tensor:
    """The bias's gradient, [E, O]."""
    return grad.sum((1, *range(3, grad.dim())))


def _images(x: Tensor, weight: Tensor, member: int) -> Tensor:
    return x if x.dim() == weight.dim() else x[member]


def _store(results: Tensor | None, result: Tensor, member: int, members: int) -> Tensor:
    """Member after member, each laid out as its result is; a single one is not copied."""
    if members == 1:
        return result.unsqueeze(0)
    if results is None:
        strides = result.numel(), *result.stride()
        results = result.new_empty_strided((members, *result.shape), strides)
    results[member].copy_(result)
    return results
