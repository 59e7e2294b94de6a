"""MixtureLinear and MixtureConv2d: each member's weight is its own linear combination of shared templates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import mixture_conv2d, mixture_linear
from ..ops._checks import reject
from ..ops._convolution import Numbers
from ._convolution import Convolution
from ._layout import checked_activation, layout_repr, positive
from ._mixture import Mixture
from .bank import TemplateBank


class MixtureLinear(Mixture):
    r"""A linear layer per member, whose weight is its own linear combination of shared templates.

    .. math:: y_e = \mathrm{act}\Bigl(x_e \bigl(\textstyle\sum_t \alpha_{et} T_t\bigr)^\top + b_e\Bigr)

    MixtureEnsembles (Teterwak et al. 2021, "MixtureEnsembles: Leveraging Parameter Sharing for Efficient Ensembles",
    equation 2).

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`; with a bank, device and dtype are the
            bank's unless given.
        num_members: E.
        num_templates: how many templates each member combines.
        bank: None for one of its own, or a :class:`TemplateBank` that layers share, of this layer's shape or flat.  It
            has to be registered where the layers are used: the layer refers to it, and does not list its parameters.
        start: of a shared bank, the first template that this layer combines; its templates follow modulo the bank's
            size.  In a flat blob the first number; there a run that goes past the end is moved back to the end.
        disjoint: members combine different templates, the next in the bank for each, as long as there are any.
        std: of the members' weights at the beginning; None as torch.nn draws them.
        shared_bias: one bias `[O]` for all members.
        activation: fused into the product; None, "relu", "gelu", "silu" or "tanh".
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.
        tiled: inputs and outputs are `[E*B, ...]`, all rows of the first member first, with any axes between rows and
            features; then there is no shared input.

    Parameters `coefficients` `[E, num_templates]`, `bias` `[E, O]` or `[O]`, and `bank.templates` `[T, O, I]` of a bank
    of its own.  Coefficients are drawn as a random direction for each member, of the length that gives weights of
    `std`: length 1 where the bank's templates have it.  Weight decay should leave them out.

    `forward(input, member=None)`: `input` is `[B, I]` (the same rows for every member) or per member; with
    `member=e` that member alone runs, `[B, I]` to `[B, O]`.  `fold()` gives plain weights and biases of the members,
    `[E, O, I]` and `[E, O]`; `fold(e)` those of one.

    Example:
        >>> layer = MixtureLinear(8, 64, num_members=5, num_templates=3, activation="relu")
        >>> layer(torch.randn(32, 8)).shape, layer(torch.randn(32, 8), member=3).shape
        (torch.Size([5, 32, 64]), torch.Size([32, 64]))
        >>> {name: list(p.shape) for name, p in layer.named_parameters()}
        {'coefficients': [5, 3], 'bias': [5, 64], 'bank.templates': [3, 64, 8]}
    """

    FEATURES = "I"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_members: int,
        num_templates: int,
        bias: bool = True,
        *,
        bank: TemplateBank | None = None,
        start: int = 0,
        disjoint: bool = False,
        std: float | None = None,
        shared_bias: bool = False,
        activation: str | None = None,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("MixtureLinear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.activation = checked_activation("MixtureLinear", activation)
        sizes = (out_features, in_features), num_members, num_templates
        layout = shared_bias, batch_first, tiled
        self._construct(*sizes, bias, bank, start, disjoint, std, *layout, device, dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, num_members: int, num_templates: int, *, spread: float = 0.5, **options: object
    ) -> MixtureLinear:
        """Members around the given layer: the mean of their weights is its weight, and each has its bias.

        The first template is the layer's weight, with coefficient 1 for every member; the others are drawn with the
        same root mean square, and their coefficients add up to 0 over the members.

        Args:
            linear: its dtype, device and mode are kept.
            num_templates: with 1, all members begin as the layer.
            spread: how far from it members begin, relative to the size of its weight, about.
            options: keyword arguments of the constructor but bank, start, disjoint, std, bias, device and dtype.
        """
        if not isinstance(linear, nn.Linear):
            reject("MixtureLinear.from_linear", "linear", "a torch.nn.Linear", type(linear).__name__, TypeError)
        _own_bank("MixtureLinear.from_linear", options)
        sizes = linear.in_features, linear.out_features, num_members, num_templates, linear.bias is not None
        layer = cls(*sizes, **options, device=linear.weight.device, dtype=linear.weight.dtype)
        layer._take(linear, spread)
        return layer

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        if self.tiled and member is None and isinstance(input, Tensor) and input.dim() > 2:
            if input.shape[0] % self.num_members == 0:
                return super().forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])
        return super().forward(input, member)

    def _product(self, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None) -> Tensor:
        return mixture_linear(x, coefficients, templates, bias, activation=self.activation)

    def _plain(self, member: int) -> nn.Linear:
        bias = self.bias is not None
        return self._filled(nn.Linear(self.in_features, self.out_features, bias, device="meta"), member)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            f"num_templates={self.num_templates}, "
            + self._repr()
            + (f", activation={self.activation!r}" if self.activation else "")
            + layout_repr(self.batch_first, self.tiled)
        )


class MixtureConv2d(Mixture, Convolution):
    r"""A convolution per member, whose weight is its own linear combination of shared templates.

    MixtureEnsembles (Teterwak et al. 2021, equation 2), as :class:`MixtureLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `torch.nn.Conv2d`; with a bank, device and dtype are the bank's unless given.
        num_members, num_templates, bank, start, disjoint, std, shared_bias, batch_first, tiled: as in
            :class:`MixtureLinear`.

    Parameters `coefficients` `[E, num_templates]`, `bias` `[E, O]` or `[O]`, and `bank.templates`
    `[T, O, C / groups, kh, kw]` of a bank of its own, drawn as those of :class:`MixtureLinear`.

    `forward(input, member=None)`: `input` is `[B, C, H, W]` (the same images for every member) or per member; with
    `member=e` that member alone runs, `[B, C, H, W]` to `[B, O, H', W']`.  `fold()` gives the weights and biases of E
    plain convolutions, `[E, O, C / groups, kh, kw]` and `[E, O]`; `fold(e)` those of one.

    Example:
        >>> layer = MixtureConv2d(3, 16, 3, num_members=5, num_templates=4, padding=1)
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
        num_templates: int,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bank: TemplateBank | None = None,
        start: int = 0,
        disjoint: bool = False,
        std: float | None = None,
        shared_bias: bool = False,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._read_options(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        sizes = self._weight_shape(), num_members, num_templates
        layout = shared_bias, batch_first, tiled
        self._construct(*sizes, bias, bank, start, disjoint, std, *layout, device, dtype)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, num_members: int, num_templates: int, *, spread: float = 0.5, **options: object
    ) -> MixtureConv2d:
        """Members around the given convolution, as :meth:`MixtureLinear.from_linear`.

        Args:
            conv: its options, dtype, device, memory format and mode are kept.
            num_templates, spread: as in :meth:`MixtureLinear.from_linear`.
            options: keyword arguments of the constructor that `torch.nn.Conv2d` has not, but bank, start, disjoint and
                std.
        """
        if not isinstance(conv, nn.Conv2d):
            reject("MixtureConv2d.from_conv", "conv", "a torch.nn.Conv2d", type(conv).__name__, TypeError)
        _own_bank("MixtureConv2d.from_conv", options)
        how = conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, num_members, num_templates
        layer = cls(*sizes, *how, **options, device=conv.weight.device, dtype=conv.weight.dtype)
        layer._take(conv, spread)
        return layer

    def _product(self, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = self._padded(x)
        return mixture_conv2d(x, coefficients, templates, bias, self.stride, padding, self.dilation, self.groups)

    def _plain(self, member: int) -> nn.Conv2d:
        how = self.stride, self.padding, self.dilation, self.groups, self.bias is not None, self.padding_mode
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, *how, device="meta")
        return self._filled(conv, member)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_members={self.num_members}, num_templates={self.num_templates}, "
            + self._options_repr()
            + self._repr()
            + layout_repr(self.batch_first, self.tiled)
        )


def _own_bank(layer: str, options: dict[str, object]) -> None:
    for name in ("bank", "start", "disjoint", "std"):
        if name in options:
            reject(layer, name, "left out: the layer gets a bank of its own around the given weight", "it", TypeError)
