"""BatchEnsembleMLP: one multilayer perceptron per member, of shared weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ops import rank1_mlp
from ._layout import (
    as_given,
    checked_activation,
    has_hooks,
    layout_repr,
    members_first,
    one_layout,
    one_member,
    parameters,
)
from .batchensemble import BatchEnsembleLinear


class BatchEnsembleMLP(nn.Module):
    """One multilayer perceptron per member, all members' layers sharing their weights.

    The network of BatchEnsemble (Wen et al. 2020) and of TabM (Gorishniy et al. 2025), whose layers are
    :class:`BatchEnsembleLinear`.

    Args:
        in_features: I.
        hidden_features: widths of the hidden layers; may be empty.
        out_features: O.
        num_members: E.
        activation: after each hidden layer; None, "relu", "gelu", "silu" or "tanh".
        out_activation: after the last layer; the same choice.
        init, std: of the scales of the first layer, as in :class:`BatchEnsembleLinear`.
        hidden_init: of the scales of the other layers; None for the same as of the first.  "ones", as TabM has it,
            lets members begin as one network that sees its inputs scaled in E ways.
        bias, shared_bias, batch_first, tiled, device, dtype: as in :class:`BatchEnsembleLinear`.

    Parameters `layers.0.weight` `[H, I]`, `layers.0.r` `[E, I]`, `layers.0.s` `[E, H]`, `layers.0.bias`, and so on.
    All layers run as one op, unless some have hooks or were replaced by layers of another kind: then layer by layer.

    `forward(input, member=None)`: `[B, I]` or per member to `[E, B, O]`; with `member=e`, `[B, I]` to `[B, O]`.

    Example:
        >>> model = BatchEnsembleMLP(64, [256, 256], 10, num_members=32, hidden_init="ones")
        >>> model(torch.randn(128, 64)).shape
        torch.Size([32, 128, 10])
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
        init: str = "normal",
        std: float = 0.5,
        hidden_init: str | None = None,
        bias: bool = True,
        shared_bias: bool = False,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_layout("BatchEnsembleMLP", batch_first, tiled)
        self.num_members, self.batch_first, self.tiled = num_members, batch_first, tiled
        self.activation = checked_activation("BatchEnsembleMLP", activation)
        self.out_activation = checked_activation("BatchEnsembleMLP", out_activation, "out_activation")
        widths = (in_features, *hidden_features, out_features)
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            BatchEnsembleLinear(
                i,
                o,
                num_members,
                bias,
                init=init if n == 0 or hidden_init is None else hidden_init,
                std=std,
                shared_bias=shared_bias,
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
            one_member("BatchEnsembleMLP", input, member, self.num_members)
            for layer in layers:
                input = layer(input, member)
            return input
        x = members_first("BatchEnsembleMLP", input, self.num_members, self.batch_first, tiled=self.tiled)
        if any(has_hooks(layer) or type(layer).forward is not BatchEnsembleLinear.forward for layer in layers):
            for layer in layers:  # pruning, old weight_norm, layers of another kind, ...
                x = layer(x)
        else:
            groups = [parameters(layers, name) for name in ("weight", "r", "s", "bias")]
            x = rank1_mlp(x, *groups, activation=self.activation, out_activation=self.out_activation)
        return as_given(x, self.batch_first, self.tiled)

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}" + layout_repr(self.batch_first, self.tiled)
