"""BatchEnsembleLinear: one weight for all members, and scales of their own; and what its siblings share with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import rank1_linear
from ..ops._checks import reject
from ._layout import as_given, checked_activation, layout_repr, members_first, one_layout, one_member, positive

INITS = ("normal", "random_sign", "ones")


class _BatchEnsemble(nn.Module):
    """Parameters `weight`, `r`, `s` and `bias`, and what is done to them whatever the product."""

    FEATURES: str  # of one member's input after B, as messages name them
    TRANSPOSED = False  # the weight's first axis is that of the inputs

    def _construct(
        self,
        weight: tuple[int, ...],
        inputs: int,
        outputs: int,
        num_members: int,
        bias: bool,
        init: str,
        std: float,
        shared_bias: bool,
        batch_first: bool,
        tiled: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        layer = type(self).__name__
        check_scales(layer, init, std)
        one_layout(layer, batch_first, tiled)
        self.num_members, self.init, self.std, self.shared_bias = num_members, init, std, shared_bias
        self.batch_first, self.tiled = batch_first, tiled

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.weight = parameter(*weight)
        self.r, self.s = parameter(num_members, inputs), parameter(num_members, outputs)
        if bias:
            self.bias = parameter(outputs) if shared_bias else parameter(num_members, outputs)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """`weight`, then each bias, as torch.nn draws them, then `r` and `s`."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            for vector in self.bias.view(-1, self.bias.shape[-1]):
                nn.init.uniform_(vector, -bound, bound)
        draw_scales(self.init, self.std, self.r, self.s)

    @torch.no_grad()
    def _take(self, layer: nn.Module) -> None:
        """The weight and bias of a plain layer, in its memory format, and whether they are trained."""
        self.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            bias = layer.bias.detach()
            bias = bias.clone() if self.shared_bias else bias.repeat(self.num_members, 1)
            self.bias = nn.Parameter(bias, layer.bias.requires_grad)
        self.train(layer.training)

    def fold(self, member: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Plain weights and biases, one per member along a new first axis, or those of one member.

        Differentiable, and rounded once.
        """
        one = slice(None) if member is None else slice(member % self.num_members, member % self.num_members + 1)
        r, s = self.r[one], self.s[one]
        weight = folded(self.weight, *((r, s) if self.TRANSPOSED else (s, r)))
        bias = self.bias if self.bias is None else self.bias.expand(self.num_members, -1)
        if member is None:
            return weight, bias
        return weight.squeeze(0), bias if bias is None else bias[member]

    def forward(self, input: Tensor, member: int | None = None, **how: object) -> Tensor:
        layer = type(self).__name__
        if member is not None:
            one = one_member(layer, input, member, self.num_members, self.FEATURES)
            bias = self.bias if self.bias is None or self.shared_bias else self.bias[one]
            return self._product(input, self.r[one], self.s[one], bias, **how).squeeze(0)
        x = members_first(layer, input, self.num_members, self.batch_first, self.FEATURES, self.tiled)
        return as_given(self._product(x, self.r, self.s, self.bias, **how), self.batch_first, self.tiled)

    def _product(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, **how: object) -> Tensor:
        raise NotImplementedError

    def _plain(self, member: int) -> nn.Module:
        """torch.nn's layer of one member."""
        raise NotImplementedError

    @torch.no_grad()
    def _filled(self, plain: nn.Module, member: int) -> nn.Module:
        """`plain`, made on the meta device (which draws no random numbers), with the weights of a member."""
        weight, bias = self.fold(member)
        plain.weight = nn.Parameter(weight, self.weight.requires_grad)
        if bias is not None:
            plain.bias = nn.Parameter(bias.clone(), self.bias.requires_grad)
        return plain.train(self.training)

    def _repr(self) -> str:
        return (
            f"bias={self.bias is not None}, "
            + scales_repr(self.init, self.std)
            + ", shared_bias=True" * (self.bias is not None and bool(self.shared_bias))
        )


def check_scales(layer: str, init: str, std: float, argument: str = "init") -> None:
    """How scales begin; `argument` is what the layer calls `init`."""
    if not isinstance(init, str) or init not in INITS:
        reject(layer, argument, f"one of {', '.join(map(repr, INITS))}", repr(init))
    if isinstance(std, bool) or not isinstance(std, (int, float)):
        reject(layer, "std", "a number", repr(std), TypeError)
    if not 0 <= std < math.inf:
        reject(layer, "std", "finite and at least 0", repr(std))


@torch.no_grad()
def draw_scales(init: str, std: float, *scales: Tensor) -> None:
    for scale in scales:
        if init == "normal":
            nn.init.normal_(scale, 1.0, std)
        elif init == "random_sign":
            scale.bernoulli_(0.5).mul_(2).sub_(1)
        else:
            nn.init.ones_(scale)


def scales_repr(init: str, std: float) -> str:
    return f"init={init!r}" + (f", std={std}" if init == "normal" else "")


def folded(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[E, *weight.shape]: the weight times `first` [E, n] along its first axis and `second` along its second.

    `second` has the sizes of as many groups, in each of which the second axis of a part of the first stands for others.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    groups = second.shape[1] // weight.shape[1]
    second = second.to(wide).unflatten(1, (groups, 1, -1))
    second = second.expand(-1, -1, weight.shape[0] // groups, -1).flatten(1, 2)
    kernel = (None,) * (weight.dim() - 2)
    scale = (second * first.to(wide).unsqueeze(-1))[(..., *kernel)]
    return (weight.to(wide) * scale).to(weight.dtype)


class BatchEnsembleLinear(_BatchEnsemble):
    r"""A linear layer per member, of one shared weight.

    .. math:: y_e = \mathrm{act}\bigl(((x_e \circ r_e) W^\top) \circ s_e + b_e\bigr)

    BatchEnsemble (Wen et al. 2020, equations 1 and 5).  `r` scales inputs and `s` outputs, as in the paper's code; the
    notebook in probly's documentation names them the other way round.  The bias is not scaled; some write-ups apply `s`
    after adding it.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        num_members: E.
        init: of `r` and `s`; "normal" of mean 1 and standard deviation `std`, "random_sign" (1 or -1), or "ones",
            with which all members begin as one.
        std: for `init="normal"`.
        shared_bias: one bias `[O]` for all members.
        activation: fused into the product; None, "relu", "gelu", "silu" or "tanh".
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.
        tiled: inputs and outputs are `[E*B, ...]`, all rows of the first member first, with any axes between rows and
            features; then there is no shared input.

    Parameters `weight` `[O, I]`, `r` `[E, I]`, `s` `[E, O]`, `bias` `[E, O]` or `[O]`; weight and each bias are drawn
    as those of `torch.nn.Linear`.

    `forward(input, member=None)`: `input` is `[B, I]` (the same rows for every member) or per member; with
    `member=e` that member alone runs, `[B, I]` to `[B, O]`.  `fold()` gives the weight and bias of an `EnsembleLinear`
    with the same values, `fold(e)` those of one member.

    Example:
        >>> layer = BatchEnsembleLinear(8, 64, num_members=5, activation="relu")
        >>> layer(torch.randn(32, 8)).shape, layer(torch.randn(32, 8), member=3).shape
        (torch.Size([5, 32, 64]), torch.Size([32, 64]))
        >>> tiled = BatchEnsembleLinear.from_linear(torch.nn.Linear(8, 64), num_members=5, tiled=True)
        >>> tiled(torch.randn(5 * 32, 8)).shape
        torch.Size([160, 64])
    """

    FEATURES = "I"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_members: int,
        bias: bool = True,
        *,
        init: str = "normal",
        std: float = 0.5,
        shared_bias: bool = False,
        activation: str | None = None,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("BatchEnsembleLinear", in_features=in_features, out_features=out_features, num_members=num_members)
        self.in_features, self.out_features = in_features, out_features
        self.activation = checked_activation("BatchEnsembleLinear", activation)
        sizes = (out_features, in_features), in_features, out_features, num_members
        self._construct(*sizes, bias, init, std, shared_bias, batch_first, tiled, device, dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_members: int, **options: object) -> BatchEnsembleLinear:
        """Members of the given layer's weight and bias (copied), with scales of their own.

        Args:
            linear: its dtype, device, `requires_grad` and mode are kept.
            options: keyword arguments of the constructor but bias, device and dtype.
        """
        if not isinstance(linear, nn.Linear):
            reject("BatchEnsembleLinear.from_linear", "linear", "a torch.nn.Linear", type(linear).__name__, TypeError)
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        sizes = linear.in_features, linear.out_features, num_members, linear.bias is not None
        layer = cls(*sizes, **options, **place)
        layer._take(linear)
        return layer

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        if self.tiled and member is None and isinstance(input, Tensor) and input.dim() > 2:
            if input.shape[0] % self.num_members == 0:
                y = super().forward(input.flatten(0, -2))
                return y.unflatten(0, input.shape[:-1])
        return super().forward(input, member)

    def _product(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        return rank1_linear(x, self.weight, r, s, bias, activation=self.activation)

    def _plain(self, member: int) -> nn.Linear:
        return self._filled(
            nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"), member
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            + self._repr()
            + (f", activation={self.activation!r}" if self.activation else "")
            + layout_repr(self.batch_first, self.tiled)
        )
