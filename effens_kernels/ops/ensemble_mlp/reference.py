"""ensemble_mlp in plain PyTorch: a chain of grouped_linear's reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..grouped_linear.reference import grouped_linear


def ensemble_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: str | None = "relu",
    out_activation: str | None = None,
) -> Tensor:
    biases = [None] * len(weights) if biases is None else biases
    last = len(weights) - 1
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = grouped_linear(x, weight, bias, out_activation if n == last else activation)
    return x
