"""A linear op on the CUDA kernels with a tile size of choice, which the public op leaves to the kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effens_kernels import _native
from effens_kernels._precision import uses_tf32
from effens_kernels.ops._activations import ACTIVATIONS

TILES = (0, 1, 2)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: str, activation: str | None, tile: int, *tensors: Tensor) -> Tensor:
        """`tensors`: the factors, then the bias."""
        what = ACTIVATIONS[activation]
        save, tf32 = what.saves == "preactivation", uses_tf32(tensors[0].dtype)
        y, z = getattr(_native.cuda_ops, f"{op}_fwd").default(*tensors, what.code, save, tf32, tile)
        ctx.save_for_backward(*tensors[:-1], z if save else y)
        ctx.op, ctx.code, ctx.tile = op, what.code, tile
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *factors, saved = ctx.saved_tensors
        need, tf32 = ctx.needs_input_grad[3:], uses_tf32(grad.dtype)
        bwd = getattr(_native.cuda_ops, f"{ctx.op}_bwd").default
        found = bwd(grad, *factors, saved, ctx.code, *need, tf32, ctx.tile)
        return None, None, None, *(t if n else None for t, n in zip(found, need))


def tiled(op: str, activation: str | None, tile: int) -> Callable[..., Tensor]:
    """The op as a function of its factors and bias."""

    def function(*tensors: Tensor) -> Tensor:
        return _Tiled.apply(op, activation, tile, *tensors)

    return function
