"""rank1_linear in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .._activations import ACTIVATIONS


def rank1_linear(
    x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    z = torch.matmul(x * r[:, None, :], weight.t()) * s[:, None, :]
    if bias is not None:
        z = z + (bias if bias.dim() == 1 else bias[:, None, :])
    return ACTIVATIONS[activation].apply(z)
