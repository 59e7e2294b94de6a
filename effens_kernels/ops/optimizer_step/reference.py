"""sgd_step and adamw_step in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import ADAMW, SGD

Tensors = Sequence[Tensor]


def sgd_step_(params: Tensors, grads: Tensors, momentum_buffers: Tensors, coefficients: Tensor, nesterov: bool) -> None:
    buffers = momentum_buffers or [None] * len(params)
    for param, grad, buffer, table in zip(params, grads, buffers, coefficients):
        by = _columns(SGD, table, param)
        p = param.to(by["lr"].dtype)
        d = torch.where(by["weight_decay"] == 0, by["sign"] * grad, by["sign"] * grad + by["weight_decay"] * p)
        if buffer is not None:
            b = by["kept"] * buffer + by["fresh"] * d
            with_momentum = by["momentum"] != 0
            _put(buffer, b, by["active"] & with_momentum)
            d = torch.where(with_momentum, d + by["momentum"] * b if nesterov else b, d)
        _put(param, p - by["lr"] * d, by["active"])


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    coefficients: Tensor,
) -> None:
    most = max_exp_avg_sqs or [None] * len(params)
    for param, grad, average, square, largest, table in zip(params, grads, exp_avgs, exp_avg_sqs, most, coefficients):
        by = _columns(ADAMW, table, param)
        g, p = by["sign"] * grad, param.to(by["eps"].dtype)
        m = average + by["grad_share"] * (g - average)
        v = by["kept"] * square + by["square_share"] * g * g
        _put(average, m, by["active"])
        _put(square, v, by["active"])
        if largest is not None:
            v = torch.maximum(largest.to(v.dtype), v)
            _put(largest, v, by["active"])
        updated = by["decay"] * p - by["step_size"] * m / (v.sqrt() * by["inverse_root"] + by["eps"])
        _put(param, updated, by["active"])


def _columns(names: Sequence[str], table: Tensor, param: Tensor) -> dict[str, Tensor]:
    """[E, K] as named columns that go with a parameter [E, ...], in float32 at least."""
    wide = torch.promote_types(param.dtype, torch.float32)
    shape = (-1, *(1,) * (param.dim() - 1)) if len(table) > 1 else (1,) * param.dim()
    columns = {name: column.reshape(shape) for name, column in zip(names, table.to(param.device, wide).unbind(1))}
    return {**columns, "active": columns["active"] != 0}


def _put(to: Tensor, value: Tensor, where: Tensor) -> None:
    to.copy_(torch.where(where, value, to))
