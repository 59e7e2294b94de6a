"""multihead_linear in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def multihead_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = "bi" if x.dim() == 2 else "ebi"
    heads = "hoi->bho" if weight.dim() == 3 else "ehoi->ebho"
    y = torch.einsum(f"{rows},{heads}", x, weight)
    return y if bias is None else y + bias.unsqueeze(-3)
