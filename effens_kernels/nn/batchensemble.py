"""BatchEnsembleLinear and BatchEnsembleConv2d: one weight for all members, and scales of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import rank1_conv2d, rank1_linear
from ..ops._checks import reject
from ..ops._convolution import Numbers
from ._convolution import Convolution
from ._layout import as_given, checked_activation, layout_repr, members_first, one_layout, one_member, positive

INITS = ("normal", "random_sign", "ones")


class _BatchEnsemble(nn.Module):
    """Parameters `weight`, `r`, `s` and `bias`, and what is done to them whatever the product."""

    FEATURES: str  # of one member's input after B, as messages name them

    def _construct(
        self,
        weight: tuple[int, ...],
        inputs: int,
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
        if not isinstance(init, str) or init not in INITS:
            reject(layer, "init", f"one of {', '.join(map(repr, INITS))}", repr(init))
        if isinstance(std, bool) or not isinstance(std, (int, float)):
            reject(layer, "std", "a number", repr(std), TypeError)
        if not 0 <= std < math.inf:
            reject(layer, "std", "finite and at least 0", repr(std))
        one_layout(layer, batch_first, tiled)
        self.num_members, self.init, self.std, self.shared_bias = num_members, init, std, shared_bias
        self.batch_first, self.tiled = batch_first, tiled

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        outputs = weight[0]
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
        for scale in (self.r, self.s):
            if self.init == "normal":
                nn.init.normal_(scale, 1.0, self.std)
            elif self.init == "random_sign":
                scale.bernoulli_(0.5).mul_(2).sub_(1)
            else:
                nn.init.ones_(scale)

    @torch.no_grad()
    def _take(self, layer: nn.Module) -> None:
        """The weight and bias of a plain layer, in its memory format, and whether they are trained."""
        self.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            bias = layer.bias.detach()
            bias = bias.clone() if self.shared_bias else bias.repeat(self.num_members, 1)
            self.bias = nn.Parameter(bias, layer.bias.requires_grad)
        self.train(layer.training)

    def fold(self) -> tuple[Tensor, Tensor | None]:
        """Plain weights and biases, one per member along a new first axis: differentiable, and rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        groups = self.r.shape[1] // self.weight.shape[1]
        kernel = (None,) * (self.weight.dim() - 2)
        r = self.r.to(wide).unflatten(1, (groups, 1, -1))
        r = r.expand(-1, -1, self.weight.shape[0] // groups, -1).flatten(1, 2)  # [E, O, I / groups]
        scale = (r * self.s.to(wide).unsqueeze(-1))[(..., *kernel)]
        weight = (self.weight.to(wide) * scale).to(self.weight.dtype)
        return weight, self.bias if self.bias is None else self.bias.expand(self.num_members, -1)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layer = type(self).__name__
        if member is not None:
            one = one_member(layer, input, member, self.num_members, self.FEATURES)
            bias = self.bias if self.bias is None or self.shared_bias else self.bias[one]
            return self._product(input, self.r[one], self.s[one], bias).squeeze(0)
        x = members_first(layer, input, self.num_members, self.batch_first, self.FEATURES, self.tiled)
        return as_given(self._product(x, self.r, self.s, self.bias), self.batch_first, self.tiled)

    def _product(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _repr(self) -> str:
        return (
            f"bias={self.bias is not None}, init={self.init!r}"
            + (f", std={self.std}" if self.init == "normal" else "")
            + ", shared_bias=True" * (self.bias is not None and bool(self.shared_bias))
        )


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
        tiled: inputs and outputs are `[E*B, ...]`, all rows of the first member first; then there is no shared input.

    Parameters `weight` `[O, I]`, `r` `[E, I]`, `s` `[E, O]`, `bias` `[E, O]` or `[O]`; weight and each bias are drawn
    as those of `torch.nn.Linear`.

    `forward(input, member=None)`: `input` is `[B, I]` (the same rows for every member) or per member; with
    `member=e` that member alone runs, `[B, I]` to `[B, O]`.  `fold()` gives the weight and bias of an `EnsembleLinear`
    with the same values.

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
        shape = out_features, in_features
        self._construct(
            shape, in_features, num_members, bias, init, std, shared_bias, batch_first, tiled, device, dtype
        )

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

    def _product(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        return rank1_linear(x, self.weight, r, s, bias, activation=self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            + self._repr()
            + (f", activation={self.activation!r}" if self.activation else "")
            + layout_repr(self.batch_first, self.tiled)
        )


class BatchEnsembleConv2d(_BatchEnsemble, Convolution):
    r"""A convolution per member, of one shared weight: :math:`y_e = \mathrm{conv}(x_e \circ r_e, W) \circ s_e + b_e`.

    BatchEnsemble (Wen et al. 2020, equation 5), as :class:`BatchEnsembleLinear`; `r` scales input channels, `s` output
    channels and not the bias.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `torch.nn.Conv2d`.
        num_members: E.
        init, std, shared_bias, batch_first, tiled: as in :class:`BatchEnsembleLinear`.

    Parameters `weight` `[O, C / groups, kh, kw]`, `r` `[E, C]`, `s` `[E, O]`, `bias` `[E, O]` or `[O]`; weight and each
    bias are drawn as those of `torch.nn.Conv2d`.

    `forward(input, member=None)`: `input` is `[B, C, H, W]` (the same images for every member) or per member; with
    `member=e` that member alone runs, `[B, C, H, W]` to `[B, O, H', W']`.  `fold()` gives the weights and biases of E
    plain convolutions, `[E, O, C / groups, kh, kw]` and `[E, O]`.

    Example:
        >>> layer = BatchEnsembleConv2d(3, 16, 3, num_members=5, padding=1)
        >>> layer(torch.randn(32, 3, 28, 28)).shape, layer(torch.randn(32, 3, 28, 28), member=3).shape
        (torch.Size([5, 32, 16, 28, 28]), torch.Size([32, 16, 28, 28]))
    """

    FEATURES = "C, H, W"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        num_members: int,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        init: str = "normal",
        std: float = 0.5,
        shared_bias: bool = False,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("BatchEnsembleConv2d", num_members=num_members)
        self._read_options(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        shape = self._weight_shape()
        self._construct(
            shape, in_channels, num_members, bias, init, std, shared_bias, batch_first, tiled, device, dtype
        )

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, num_members: int, **options: object) -> BatchEnsembleConv2d:
        """Members of the given convolution's weight and bias (copied), with scales of their own.

        Args:
            conv: its options, dtype, device, memory format, `requires_grad` and mode are kept.
            options: keyword arguments of the constructor that `torch.nn.Conv2d` has not.
        """
        if not isinstance(conv, nn.Conv2d):
            reject("BatchEnsembleConv2d.from_conv", "conv", "a torch.nn.Conv2d", type(conv).__name__, TypeError)
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, num_members
        how = conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode
        layer = cls(*sizes, *how, **options, device=conv.weight.device, dtype=conv.weight.dtype)
        layer._take(conv)
        return layer

    def _product(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = self._padded(x)
        return rank1_conv2d(x, self.weight, r, s, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_members={self.num_members}, "
            + self._options_repr()
            + self._repr()
            + layout_repr(self.batch_first, self.tiled)
        )
