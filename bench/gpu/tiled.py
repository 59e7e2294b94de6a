"""grouped_linear on the CUDA kernels with a tile size of choice, which the public op leaves to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from effens_kernels import _native
from effens_kernels._precision import uses_tf32
from effens_kernels.ops._activations import ACTIVATIONS

from ..contestants import Contestant, Problem
from ..contestants.grouped_linear import from_function

TILES = (0, 1, 2)


class _TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, tile: int) -> Tensor:
        what = ACTIVATIONS[activation]
        save = what.saves == "preactivation"
        y, z = _native.cuda_ops.grouped_linear_fwd.default(x, weight, bias, what.code, save, uses_tf32(x.dtype), tile)
        ctx.save_for_backward(x, weight, z if save else y)
        ctx.code, ctx.tile = what.code, tile
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        found = _native.cuda_ops.grouped_linear_bwd.default(
            grad, x, weight, saved, ctx.code, *need, uses_tf32(x.dtype), ctx.tile
        )
        return *(t if n else None for t, n in zip(found, need)), None, None


def tiled(problem: Problem, tile: int) -> Contestant:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _TiledLinear.apply(x, weight, bias, problem.workload.activation, tile)

    return from_function(problem, f"cuda tile {tile}", function, kind="backend")
