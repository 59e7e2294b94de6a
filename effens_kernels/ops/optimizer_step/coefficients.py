"""What a step takes besides tensors, the same for all numbers of a member: `[P, E, K]`, by the names of the columns.

They are computed in float64, as Python's numbers are in PyTorch's optimizers, and for all parameters of a group
together.  csrc/cpu/engine.h has the same columns in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

SGD = "active", "sign", "weight_decay", "momentum", "kept", "fresh", "lr"
ADAMW = "active", "sign", "decay", "grad_share", "kept", "square_share", "inverse_root", "eps", "step_size"

Value = float | Tensor  # of all members, or [E] float64


def sgd(
    steps: Tensor, active: Value, *, lr: Value, momentum: Value, dampening: Value, weight_decay: Value, maximize: bool
) -> Tensor:
    """`steps` [P, E]: how many each momentum buffer has had; the first gradient is not dampened."""
    first = steps == 0
    kept = torch.where(first, 0.0, _tensor(momentum))
    fresh = torch.where(first, 1.0, 1 - _tensor(dampening))
    return _table(steps, (active, -1.0 if maximize else 1.0, weight_decay, momentum, kept, fresh, lr))


def adamw(
    steps: Tensor,
    active: Value,
    *,
    lr: Value,
    betas: tuple[Value, Value],
    eps: Value,
    weight_decay: Value,
    maximize: bool,
) -> Tensor:
    """`steps` [P, E]: how many each member of each parameter has had, this one included."""
    beta1, beta2 = map(_tensor, betas)
    inverse_root = (1 - beta2**steps).rsqrt()
    step_size = lr / (1 - beta1**steps)
    sign = -1.0 if maximize else 1.0
    columns = active, sign, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, inverse_root, eps, step_size
    return _table(steps, columns)


def _tensor(value: Value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _table(steps: Tensor, columns: tuple[Value, ...]) -> Tensor:
    table = steps.new_empty(*steps.shape, len(columns))
    for n, column in enumerate(columns):
        table[..., n] = column
    return table
