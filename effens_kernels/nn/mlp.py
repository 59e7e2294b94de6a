"""EnsembleMLP: one multilayer perceptron per member."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ops import ensemble_mlp
from ..ops._checks import reject
from ..ops.ensemble_mlp.reference import layers as layer_by_layer
from ._layout import checked_activation, members_first, one_member, parameters, positive
from .linear import EnsembleLinear


class EnsembleMLP(nn.Module):
    """One multilayer perceptron per member, the activation fused into each hidden product.

    Args:
        in_features: I.
        hidden_features: widths of the hidden layers; may be empty.
        out_features: O.
        num_members: E.
        activation: after each hidden layer; None, "relu", "gelu", "silu" or "tanh".
        out_activation: after the last layer; the same choice.
        shared_layers: how many of the first layers have one set of weights for all members, as the trunk of a
            multi-head model has; their parameters are `[1, H, I]` and `[1, H]`.
        bias, device, dtype: as in `torch.nn.Linear`.
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.

    Parameters `layers.0.weight` `[E, H, I]`, `layers.0.bias` `[E, H]`, and so on.  All layers run as one op, unless
    there are hooks on some: then layer by layer.

    `forward(input, member=None)`: `[B, I]` or per member to `[E, B, O]`; with `member=e`, `[B, I]` to `[B, O]`.

    Example:
        >>> critics = EnsembleMLP(17, [256, 256], 1, num_members=10)
        >>> critics(torch.randn(128, 17)).shape
        torch.Size([10, 128, 1])
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
        shared_layers: int = 0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("EnsembleMLP", num_members=num_members)
        self.num_members, self.batch_first = num_members, batch_first
        self.activation = checked_activation("EnsembleMLP", activation)
        self.out_activation = checked_activation("EnsembleMLP", out_activation, "out_activation")
        if isinstance(shared_layers, bool) or not isinstance(shared_layers, int):
            reject("EnsembleMLP", "shared_layers", "an int", repr(shared_layers), TypeError)
        if not 0 <= shared_layers <= len(hidden_features) + 1:
            reject("EnsembleMLP", "shared_layers", f"0 to {len(hidden_features) + 1} layers", repr(shared_layers))
        self.shared_layers = shared_layers
        widths = (in_features, *hidden_features, out_features)
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            EnsembleLinear(
                i,
                o,
                1 if n < shared_layers else num_members,
                bias,
                activation=activation if n < last else out_activation,
                device=device,
                dtype=dtype,
            )
            for n, (i, o) in enumerate(pairwise(widths))
        )

    def reset_parameters(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layers = self._modules["layers"]._modules.values()
        if member is not None:
            one_member("EnsembleMLP", input, member, self.num_members)
            for layer in layers:
                input = layer(input, member if layer.num_members > 1 else 0)
            return input
        x = members_first("EnsembleMLP", input, self.num_members, self.batch_first)
        weights, biases = parameters(layers, "weight"), parameters(layers, "bias")
        if any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers):  # pruning, old weight_norm, ...
            calls = iter(layers)
            x = layer_by_layer(lambda x, *_: next(calls)(x), x, weights, biases, None, None)
        else:
            x = ensemble_mlp(x, weights, biases, activation=self.activation, out_activation=self.out_activation)
        if x.shape[0] != self.num_members:  # the same rows through layers that are all shared
            x = x.expand(self.num_members, -1, -1)
        return x.transpose(0, 1) if self.batch_first else x

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}" + (", batch_first=True" if self.batch_first else "")
