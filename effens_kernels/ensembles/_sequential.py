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
            then = fused_name(layers[n + 1]) if type(layer) is nn.Linear and n + 1 < len(layers) else None
            if then is None:
                input = layer(input)
            else:
                input = linear_activation(input, layer.weight, layer.bias, then)
                n += 1
            n += 1
        return input

    def _get_name(self) -> str:
        return "Sequential"


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
