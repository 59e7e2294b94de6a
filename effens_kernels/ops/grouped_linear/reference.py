"""grouped_linear in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .._activations import ACTIVATIONS


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    equation = "bi,eoi->ebo" if x.dim() == 2 else "ebi,eoi->ebo"
    z = torch.einsum(equation, x, weight)
    if bias is not None:
        z = z + bias[:, None, :]
    return ACTIVATIONS[activation].apply(z)
