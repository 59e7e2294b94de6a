"""EnsembleMLP: one multilayer perceptron per member."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ops import ensemble_mlp
from ..ops._activations import ACTIVATIONS
from ..ops._checks import reject
from ..ops.ensemble_mlp.reference import layers as layer_by_layer
from ._layout import checked_activation, has_hooks, members_first, one_member, parameters, positive
from .linear import EnsembleLinear, MultiHeadLinear


class EnsembleMLP(nn.Module):
    """One multilayer perceptron per member, the activation fused into each hidden product.

    Args:
        in_features: I.
        hidden_features: widths of the hidden layers; may be empty.
        out_features: O.
        num_members: E.
        activation: after each hidden layer; None, "relu", "gelu", "silu" or "tanh".
        out_activation: after the last layer; the same choice.
        num_heads: H, for a last layer of H heads per member; None for one output layer.
        shared_layers: how many of the first layers have one set of weights for all members, as the trunk of a
            multi-head model has; their parameters are `[1, H, I]` and `[1, H]`.
        bias, device, dtype: as in `torch.nn.Linear`.
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.

    Parameters `layers.0.weight` `[E, width, I]`, `layers.0.bias` `[E, width]`, and so on; those of heads are
    `[E, H, O, width]` and `[E, H, O]`.  All layers run as one op, unless there are hooks on some: then layer by layer.

    `forward(input, member=None)`: `[B, I]` or per member to `[E, B, O]`; with `member=e`, `[B, I]` to `[B, O]`.  With
    heads, `[E, B, H, O]` and `[B, H, O]`.

    Example:
        >>> critics = EnsembleMLP(17, [256, 256], 1, num_members=10)
        >>> critics(torch.randn(128, 17)).shape
        torch.Size([10, 128, 1])
        >>> bootstrapped = EnsembleMLP(8, [64, 64], 4, num_members=10, num_heads=5)
        >>> bootstrapped(torch.randn(128, 8)).shape
        torch.Size([10, 128, 5, 4])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        num_members: int,
        *,
        activation: str | None = "relu",
        out_activation: str | None = None,
        num_heads: int | None = None,
        shared_layers: int = 0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("EnsembleMLP", num_members=num_members)
        self.num_members, self.num_heads, self.batch_first = num_members, num_heads, batch_first
        self.activation = checked_activation("EnsembleMLP", activation)
        self.out_activation = checked_activation("EnsembleMLP", out_activation, "out_activation")
        if isinstance(shared_layers, bool) or not isinstance(shared_layers, int):
            reject("EnsembleMLP", "shared_layers", "an int", repr(shared_layers), TypeError)
        if not 0 <= shared_layers <= len(hidden_features) + 1:
            reject("EnsembleMLP", "shared_layers", f"0 to {len(hidden_features) + 1} layers", repr(shared_layers))
        self.shared_layers = shared_layers
        place = {"device": device, "dtype": dtype}
        widths = (in_features, *hidden_features, out_features)
        last = len(widths) - 2

        def layer(n: int, i: int, o: int) -> nn.Module:
            members = 1 if n < shared_layers else num_members
            if n == last and num_heads is not None:
                return MultiHeadLinear(i, o, num_heads, members, bias, **place)
            return EnsembleLinear(i, o, members, bias, activation=activation if n < last else out_activation, **place)

        self.layers = nn.ModuleList(layer(n, i, o) for n, (i, o) in enumerate(pairwise(widths)))

    def reset_parameters(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layers = self._modules["layers"]._modules.values()
        if member is not None:
            one_member("EnsembleMLP", input, member, self.num_members)
            for layer in layers:
                input = layer(input, member if layer.num_members > 1 else 0)
            return self._activated(input)
        x = members_first("EnsembleMLP", input, self.num_members, self.batch_first)
        weights, biases = parameters(layers, "weight"), parameters(layers, "bias")
        if any(map(has_hooks, layers)):  # pruning, old weight_norm, ...
            calls = iter(layers)
            x = self._activated(layer_by_layer(lambda x, *_: next(calls)(x), x, weights, biases, None, None))
        else:
            x = ensemble_mlp(x, weights, biases, activation=self.activation, out_activation=self.out_activation)
        if x.shape[0] != self.num_members:  # the same rows through layers that are all shared
            x = x.expand(self.num_members, *x.shape[1:])
        return x.transpose(0, 1) if self.batch_first else x

    def _activated(self, y: Tensor) -> Tensor:
        """The result of a last layer called by itself: heads have no activation of their own."""
        return y if self.num_heads is None else ACTIVATIONS[self.out_activation].apply(y)

    def extra_repr(self) -> str:
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return f"num_members={self.num_members}{heads}" + (", batch_first=True" if self.batch_first else "")
