"""ragged_linear in plain PyTorch: the oracle of the tests and the fallback everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activations import ACTIVATIONS
from .._registration import is_plain_eager


def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, offsets: Tensor
) -> Tensor:
    """The host reads the offsets.  Where it cannot (torch.compile, torch.func), each row gathers a weight."""
    layer = _by_member if is_plain_eager(x, weight, bias, offsets) and len(weight) else _by_row
    return ACTIVATIONS[activation].apply(layer(x, weight, bias, offsets))


def _by_member(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    rows, members = x.shape[0], weight.shape[0]
    biases = [None] * members if bias is None else bias.expand(weight.shape[:2])
    ends = offsets.clamp(0, rows).tolist()
    layers = [F.linear(x[a:b], *member) for a, b, *member in zip(ends, ends[1:], weight, biases)]
    outside = [x.new_zeros(count, weight.shape[1]) for count in (ends[0], rows - ends[-1])]
    return torch.cat([outside[0], *layers, outside[1]])


def _by_row(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    row = torch.arange(x.shape[0], device=x.device)
    inside = (row >= offsets[0]) & (row < offsets[-1])
    member = torch.searchsorted(offsets[1:].contiguous(), row.to(offsets.dtype), right=True)
    member = member.clamp(max=weight.shape[0] - 1)
    z = torch.einsum("ni,noi->no", x, weight[member])
    if bias is not None:
        z = z + bias.expand(weight.shape[:2])[member]
    return torch.where(inside[:, None], z, 0)
