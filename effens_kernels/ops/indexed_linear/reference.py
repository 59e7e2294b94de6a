"""indexed_linear in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .._activations import ACTIVATIONS


def indexed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    x_index: Tensor,
    weight_index: Tensor,
) -> Tensor:
    z = torch.einsum("gbi,goi->gbo", x[x_index], weight[weight_index])
    if bias is not None:
        z = z + (bias if bias.dim() == 1 else bias[weight_index, None, :])
    return ACTIVATIONS[activation].apply(z)
