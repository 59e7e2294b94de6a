"""nn.Sequential in a member's code: activations right after linear layers are computed with these, for all members."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..nn._fusing import fused_name
from ..ops._activations import ACTIVATIONS


def linear_activation(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(F.linear(...)), as one call that a mode sees."""
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(linear_activation, (input, weight, bias), input, weight, bias, activation)
    return ACTIVATIONS[activation].apply(F.linear(input, weight, bias))


class FusedSequential(nn.Sequential):
    """Stands for nn.Sequential in the code of members, and nowhere else.

    Example:
        >>> import torch
        >>> block = FusedSequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> bool((block(torch.randn(4, 2)) >= 0).all())
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which fuses by itself
            return super().forward(input)
        layers = list(self._modules.values())
        n = 0
        while n < len(layers):
            layer = layers[n]
            then = _activation_after(layer, layers[n + 1]) if n + 1 < len(layers) else None
            if then is None:
                input = layer(input)
            else:
                input = _with_activation(layer, input, then)
                n += 1
            n += 1
        return input

    def _get_name(self) -> str:
        return "Sequential"


def _activation_after(layer: nn.Module, then: nn.Module) -> str | None:
    """What the next module computes, if both are torch.nn's own; an object may have a `forward` of its own."""
    plain = type(layer) is nn.Linear and "forward" not in vars(layer) and "forward" not in vars(then)
    return fused_name(then) if plain else None


def _with_activation(self: nn.Linear, input: Tensor, activation: str) -> Tensor:
    """`self`, as in the layer's own code: that is where an error is said to be."""
    return linear_activation(input, self.weight, self.bias, activation)


def fuse(model: nn.Module) -> None:
    """In place; what `unfuse` undoes."""
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = FusedSequential


def unfuse(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is FusedSequential:
            module.__class__ = nn.Sequential
    return model
