"""BatchEnsembleConv1d, Conv2d and ConvTranspose2d: one weight for all members, and scales of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import rank1_conv1d, rank1_conv2d, rank1_conv_transpose2d
from ..ops._checks import reject
from ..ops._convolution import Numbers, Options, output_sizes, read_transposed
from ._convolution import Convolution
from ._layout import layout_repr, positive
from .batchensemble import _BatchEnsemble


class _BatchEnsembleConv(_BatchEnsemble, Convolution):
    PLAIN: type[nn.Module]  # torch.nn's layer of one member
    OP: Callable[..., Tensor]

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
        positive(type(self).__name__, num_members=num_members)
        self._read_options(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        sizes = self._weight_shape(), in_channels, out_channels, num_members
        self._construct(*sizes, bias, init, std, shared_bias, batch_first, tiled, device, dtype)

    @classmethod
    def from_conv(cls, conv: nn.Module, num_members: int, **options: object) -> _BatchEnsembleConv:
        """Members of the given convolution's weight and bias (copied), with scales of their own.

        Args:
            conv: its options, dtype, device, memory format, `requires_grad` and mode are kept.
            options: keyword arguments of the constructor that torch.nn's has not.
        """
        if not isinstance(conv, cls.PLAIN):
            expected = f"a torch.nn.{cls.PLAIN.__name__}"
            reject(f"{cls.__name__}.from_conv", "conv", expected, type(conv).__name__, TypeError)
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, num_members
        layer = cls(*sizes, *cls._options(conv), **options, device=conv.weight.device, dtype=conv.weight.dtype)
        layer._take(conv)
        return layer

    @staticmethod
    def _options(conv: nn.Module) -> tuple[object, ...]:
        """Of a layer of torch.nn or of ours, in the order of the constructors."""
        return conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode

    def _product(self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = self._padded(x)
        return type(self).OP(x, self.weight, r, s, bias, self.stride, padding, self.dilation, self.groups)

    def _plain(self, member: int) -> nn.Module:
        sizes = self.in_channels, self.out_channels, self.kernel_size
        return self._filled(self.PLAIN(*sizes, *self._options(self), device="meta"), member)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_members={self.num_members}, "
            + self._options_repr()
            + self._repr()
            + layout_repr(self.batch_first, self.tiled)
        )


class BatchEnsembleConv2d(_BatchEnsembleConv):
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
    plain convolutions, `[E, O, C / groups, kh, kw]` and `[E, O]`; `fold(e)` those of one.

    Example:
        >>> layer = BatchEnsembleConv2d(3, 16, 3, num_members=5, padding=1)
        >>> layer(torch.randn(32, 3, 28, 28)).shape, layer(torch.randn(32, 3, 28, 28), member=3).shape
        (torch.Size([5, 32, 16, 28, 28]), torch.Size([32, 16, 28, 28]))
    """

    FEATURES = "C, H, W"
    PLAIN, OP = nn.Conv2d, rank1_conv2d


class BatchEnsembleConv1d(_BatchEnsembleConv):
    """A convolution along one axis per member, of one shared weight, as :class:`BatchEnsembleConv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `torch.nn.Conv1d`.
        num_members: E.
        init, std, shared_bias, batch_first, tiled: as in :class:`BatchEnsembleLinear`.

    Parameters `weight` `[O, C / groups, k]`, `r` `[E, C]`, `s` `[E, O]`, `bias` `[E, O]` or `[O]`; `forward` takes
    `[B, C, L]` or per member.

    Example:
        >>> layer = BatchEnsembleConv1d(8, 16, 5, num_members=4, padding="same")
        >>> layer(torch.randn(32, 8, 100)).shape
        torch.Size([4, 32, 16, 100])
    """

    AXES, FEATURES = 1, "C, L"
    PLAIN, OP = nn.Conv1d, rank1_conv1d


class BatchEnsembleConvTranspose2d(_BatchEnsembleConv):
    """A transposed convolution per member, of one shared weight, as :class:`BatchEnsembleConv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as in `torch.nn.ConvTranspose2d`.
        num_members: E.
        init, std, shared_bias, batch_first, tiled: as in :class:`BatchEnsembleLinear`.

    Parameters `weight` `[C, O / groups, kh, kw]`, `r` `[E, C]`, `s` `[E, O]`, `bias` `[E, O]` or `[O]`.

    `forward(input, output_size=None, member=None)`: as :class:`BatchEnsembleConv2d`; with an `output_size`, `[H', W']`
    or the whole shape of the result of the plain layer, in place of `output_padding`.

    Example:
        >>> layer = BatchEnsembleConvTranspose2d(8, 3, 2, num_members=4, stride=2)
        >>> layer(torch.randn(32, 8, 7, 7)).shape
        torch.Size([4, 32, 3, 14, 14])
    """

    FEATURES, TRANSPOSED = "C, H, W", True
    PLAIN = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        num_members: int,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Numbers = 1,
        padding_mode: str = "zeros",
        **options: object,
    ) -> None:
        layer = type(self).__name__
        if padding_mode != "zeros":
            reject(layer, "padding_mode", "'zeros'", repr(padding_mode))
        checked = read_transposed(layer, self.AXES, stride, padding, output_padding, groups, dilation)
        sizes = in_channels, out_channels, kernel_size, num_members
        super().__init__(*sizes, stride, padding, dilation, groups, bias, padding_mode, **options)
        self.output_padding = checked.output_padding

    @staticmethod
    def _options(conv: nn.Module) -> tuple[object, ...]:
        how = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.bias is not None
        return *how, conv.dilation, conv.padding_mode

    def _weight_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None, member: int | None = None) -> Tensor:
        extra = self.output_padding if output_size is None else self._extra(input, output_size)
        return super().forward(input, member, output_padding=extra)

    def _extra(self, input: Tensor, size: Sequence[int]) -> tuple[int, ...]:
        """What the output padding has to be for a result of this size."""
        how = self.stride, self.padding, self.dilation, True, (0,) * self.AXES, self.groups
        least = output_sizes(input.shape[-self.AXES :], self.kernel_size, Options(*how))
        extra = tuple(n - m for n, m in zip(size[-self.AXES :], least))
        if len(size) not in (self.AXES, self.AXES + 2) or any(not 0 <= n < s for n, s in zip(extra, self.stride)):
            most = [m + s - 1 for m, s in zip(least, self.stride)]
            reject(type(self).__name__, "output_size", f"from {least} to {most}", repr(list(size)))
        return extra

    def _product(
        self, x: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, output_padding: tuple[int, ...] = ()
    ) -> Tensor:
        how = self.stride, self.padding, output_padding or self.output_padding, self.groups, self.dilation
        return rank1_conv_transpose2d(x, self.weight, r, s, bias, *how)
