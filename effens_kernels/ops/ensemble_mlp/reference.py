"""ensemble_mlp in plain PyTorch: a chain of grouped_linear's reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..grouped_linear.reference import grouped_linear


def ensemble_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None = "relu",
    out_activation: str | None = None,
) -> Tensor:
    return layers(grouped_linear, x, weights, biases, activation, out_activation)


def layers(
    linear: Callable[..., Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
) -> Tensor:
    """Layer after layer; where one shares its weights, the rows of all members are rows of one member."""
    last = len(weights) - 1
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        act = out_activation if n == last else activation
        if weight.shape[0] == 1 and x.dim() == 3:
            x = linear(x.flatten(0, 1), weight, bias, act).squeeze(0).unflatten(0, x.shape[:2])
        else:
            x = linear(x, weight, bias, act)
            if weight.shape[0] == 1 and n < last:
                x = x.squeeze(0)
    return x
