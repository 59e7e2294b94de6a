"""What the layers of convolutions share: options read as torch.nn reads them, and padding that is no zeros."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import reject
from ..ops._convolution import Numbers, numbers
from ._layout import positive

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Convolution(nn.Module):
    """The options of `torch.nn.Conv1d` and so on as attributes of the same names."""

    AXES = 2  # of an image

    def _read_options(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        stride: Numbers,
        padding: Numbers | str,
        dilation: Numbers,
        groups: int,
        padding_mode: str,
    ) -> None:
        layer = type(self).__name__
        positive(layer, in_channels=in_channels, out_channels=out_channels, groups=groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                reject(layer, name, f"a multiple of groups={groups}", repr(channels))
        if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
            reject(layer, "padding_mode", f"one of {', '.join(map(repr, PADDING_MODES))}", repr(padding_mode))
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = numbers(layer, "kernel_size", kernel_size, self.AXES, 1)
        self.stride = numbers(layer, "stride", stride, self.AXES, 1)
        self.dilation = numbers(layer, "dilation", dilation, self.AXES, 1)
        self.padding, self.padding_mode = self._checked_padding(padding), padding_mode

    def _checked_padding(self, padding: Numbers | str) -> tuple[int, ...] | str:
        layer = type(self).__name__
        if not isinstance(padding, str):
            return numbers(layer, "padding", padding, self.AXES, 0)
        if padding not in ("same", "valid"):
            reject(layer, "padding", "numbers, 'same' or 'valid'", repr(padding))
        if padding == "same" and max(self.stride) > 1:
            reject(layer, "padding", f"numbers or 'valid' with stride {self.stride}", repr(padding))
        return padding

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """The images, and the zeros that remain to be put around them."""
        if self.padding_mode == "zeros":
            return x, self.padding
        amounts: list[int] = []  # left, right, top, bottom
        for axis in reversed(range(self.AXES)):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if self.padding == "same":
                amounts += [total // 2, total - total // 2]
            else:
                amounts += [0 if self.padding == "valid" else self.padding[axis]] * 2
        rows = x.shape[: -1 - self.AXES]
        return F.pad(x.flatten(0, -2 - self.AXES), amounts, self.padding_mode).unflatten(0, rows), (0,) * self.AXES

    def _options_repr(self) -> str:
        none, one = (0,) * self.AXES, (1,) * self.AXES
        defaults = {"padding": none, "output_padding": none, "dilation": one, "groups": 1, "padding_mode": "zeros"}
        return f"stride={self.stride}, " + "".join(
            f"{k}={getattr(self, k)!r}, " for k, v in defaults.items() if getattr(self, k, v) != v
        )
