"""The one table of activations: what each computes, what its backward needs, and its derivatives.

`code` is what compiled kernels receive.  `saves` says which tensor the derivative is a function of:
the output y (relu, tanh: nothing more to store), or the pre-activation z (gelu, silu: y does not determine it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    code: int
    apply: Callable[[Tensor], Tensor]
    saves: str  # "nothing", "output" or "preactivation"
    slope: Callable[[Tensor], Tensor]  # da/dz as a function of the saved tensor
    curvature: Callable[[Tensor], Tensor]  # derivative of `slope` with respect to the saved tensor


def _normal_pdf(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * _normal_pdf(z)


def _silu_slope(z: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return p * (1 + z * (1 - p))


def _silu_curvature(z: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return p * (1 - p) * (2 + z * (1 - 2 * p))


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(0, lambda z: z, "nothing", torch.ones_like, torch.zeros_like),
    "relu": Activation(1, F.relu, "output", lambda y: (y > 0).to(y.dtype), torch.zeros_like),
    "gelu": Activation(2, F.gelu, "preactivation", _gelu_slope, lambda z: _normal_pdf(z) * (2 - z * z)),
    "silu": Activation(3, F.silu, "preactivation", _silu_slope, _silu_curvature),
    "tanh": Activation(4, torch.tanh, "output", lambda y: 1 - y * y, lambda y: -2 * y),
}


def saves_preactivation(activation: str | None) -> bool:
    return ACTIVATIONS[activation].saves == "preactivation"
