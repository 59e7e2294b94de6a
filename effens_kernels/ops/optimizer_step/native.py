"""sgd_step and adamw_step on the C++ CPU engine of the compiled extension: all parameters in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _native

Tensors = Sequence[Tensor]


def sgd_step_(params: Tensors, grads: Tensors, momentum_buffers: Tensors, coefficients: Tensor, nesterov: bool) -> None:
    _native.ops.sgd_step_.default(params, grads, momentum_buffers, coefficients, nesterov)


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    coefficients: Tensor,
) -> None:
    _native.ops.adamw_step_.default(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, coefficients)
