"""EnsembleLinear and MultiHeadLinear: `torch.nn.Linear` for all members, or all heads, in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import grouped_linear, multihead_linear
from ._layout import checked_activation, members_first, one_member, positive, reset_like_linear


class EnsembleLinear(nn.Module):
    r"""One `torch.nn.Linear` per member: :math:`y_e = \mathrm{act}(x_e W_e^\top + b_e)`.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        num_members: E.
        activation: fused into the product; None, "relu", "gelu", "silu" or "tanh".
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.

    Parameters `weight` `[E, O, I]` and `bias` `[E, O]`; each member is initialized exactly as the E-th of as many
    `torch.nn.Linear` created in a row.

    `forward(input, member=None)`: `input` is `[B, I]` (the same rows for every member) or per member; with
    `member=e` that member alone runs, `[B, I]` to `[B, O]`.

    Example:
        >>> layer = EnsembleLinear(8, 64, num_members=5, activation="relu")
        >>> layer(torch.randn(32, 8)).shape, layer(torch.randn(32, 8), member=3).shape
        (torch.Size([5, 32, 64]), torch.Size([32, 64]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_members: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("EnsembleLinear", in_features=in_features, out_features=out_features, num_members=num_members)
        self.in_features, self.out_features, self.num_members = in_features, out_features, num_members
        self.activation = checked_activation("EnsembleLinear", activation)
        self.batch_first = batch_first
        self.weight = nn.Parameter(torch.empty(num_members, out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_members, out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_like_linear(self.weight, self.bias)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        if member is not None:
            one = one_member("EnsembleLinear", input, member, self.num_members)
            bias = None if self.bias is None else self.bias[one]
            return grouped_linear(input, self.weight[one], bias, activation=self.activation).squeeze(0)
        x = members_first("EnsembleLinear", input, self.num_members, self.batch_first)
        y = grouped_linear(x, self.weight, self.bias, activation=self.activation)
        return y.transpose(0, 1) if self.batch_first else y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            f"bias={self.bias is not None}"
            + (f", activation={self.activation!r}" if self.activation else "")
            + (", batch_first=True" if self.batch_first else "")
        )


class MultiHeadLinear(nn.Module):
    r"""H linear heads on the same features: :math:`y_h = x W_h^\top + b_h`, or H heads for each of E members.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`, for each head.
        num_heads: H.
        num_members: None for one trunk, or E for H heads per member.
        batch_first: with members, inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.

    Parameters `weight` `[H, O, I]` or `[E, H, O, I]`, `bias` `[H, O]` or `[E, H, O]`, initialized head by head as
    `torch.nn.Linear`.

    `forward(input, member=None)`: `[B, I]` to `[B, H, O]`; with members `[B, I]` or per member to `[E, B, H, O]`,
    or `[B, I]` to `[B, H, O]` for `member=e` alone.

    Example:
        >>> heads = MultiHeadLinear(64, 4, num_heads=10)
        >>> heads(torch.randn(32, 64)).shape
        torch.Size([32, 10, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        num_members: int | None = None,
        bias: bool = True,
        *,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("MultiHeadLinear", in_features=in_features, out_features=out_features, num_heads=num_heads)
        if num_members is not None:
            positive("MultiHeadLinear", num_members=num_members)
        self.in_features, self.out_features = in_features, out_features
        self.num_heads, self.num_members, self.batch_first = num_heads, num_members, batch_first
        heads = (num_heads,) if num_members is None else (num_members, num_heads)
        self.weight = nn.Parameter(torch.empty(*heads, out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(*heads, out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_like_linear(self.weight, self.bias)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        if self.num_members is None:
            if member is not None:
                raise ValueError(f"MultiHeadLinear: member should be None for a layer without members, got {member!r}")
            return multihead_linear(input, self.weight, self.bias)
        if member is not None:
            one = one_member("MultiHeadLinear", input, member, self.num_members)
            bias = None if self.bias is None else self.bias[one]
            return multihead_linear(input, self.weight[one], bias).squeeze(0)
        x = members_first("MultiHeadLinear", input, self.num_members, self.batch_first)
        y = multihead_linear(x, self.weight, self.bias)
        return y.transpose(0, 1) if self.batch_first else y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_heads={self.num_heads}, "
            + (f"num_members={self.num_members}, " if self.num_members is not None else "")
            + f"bias={self.bias is not None}"
            + (", batch_first=True" if self.batch_first else "")
        )
