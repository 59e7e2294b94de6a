"""rank1_mlp in plain PyTorch: a chain of rank1_linear's reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..rank1_linear.reference import rank1_linear


def rank1_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    r: Sequence[Tensor],
    s: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None = "relu",
    out_activation: str | None = None,
) -> Tensor:
    return layers(rank1_linear, x, weights, r, s, biases, activation, out_activation)


def layers(
    linear: Callable[..., Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    r: Sequence[Tensor],
    s: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
) -> Tensor:
    last = len(weights) - 1
    for n, factors in enumerate(zip(weights, r, s, biases, strict=True)):
        x = linear(x, *factors, out_activation if n == last else activation)
    return x
