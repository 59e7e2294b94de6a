"""The options of a convolution as `torch.convolution` takes them, read from what `torch.nn.functional` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .._checks import reject

Numbers = int | Sequence[int]


class Options(NamedTuple):
    """In the order of `torch.convolution`'s arguments after the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def default(cls, axes: int) -> Options:
        return cls((1,) * axes, (0,) * axes, (1,) * axes, False, (0,) * axes, 1)


def numbers(op: str, argument: str, value: object, axes: int, least: int) -> tuple[int, ...]:
    """`value` for each spatial axis."""
    expected = f"an int of at least {least}, or {axes} of them" if axes > 1 else f"an int of at least {least}"
    values = (value,) * axes if _is_int(value) else value
    if not isinstance(values, (tuple, list)) or not all(map(_is_int, values)):
        reject(op, argument, expected, repr(value), TypeError)
    if len(values) == 1:
        values = (values[0],) * axes
    if len(values) != axes or min(values) < least:
        reject(op, argument, expected, repr(value))
    return tuple(values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def padded(
    op: str, x: Tensor, weight: Tensor, padding: Numbers | str, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """`padding` as numbers; where "same" needs more on one side, x with that much more, as torch does it."""
    axes = len(stride)
    if not isinstance(padding, str):
        return x, numbers(op, "padding", padding, axes, 0)
    if padding not in ("same", "valid"):
        reject(op, "padding", "numbers, 'same' or 'valid'", repr(padding))
    if padding == "valid":
        return x, (0,) * axes
    if max(stride) > 1:
        reject(op, "padding", f"numbers or 'valid' with stride {stride}", repr(padding))
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    odd = [n % 2 for n in total]
    if any(odd):
        x = F.pad(x, [amount for n in reversed(odd) for amount in (0, n)])
    return x, tuple(n // 2 for n in total)


def output_sizes(x: Tensor, weight: Tensor, options: Options) -> list[int]:
    """Spatial sizes of the result."""
    axes = weight.dim() - 2
    sizes = []
    for n, k, stride, pad, dilation, extra in zip(
        x.shape[-axes:], weight.shape[2:], options.stride, options.padding, options.dilation, options.output_padding
    ):
        reach = dilation * (k - 1) + 1
        if options.transposed:
            sizes.append((n - 1) * stride - 2 * pad + reach + extra)
        else:
            sizes.append((n + 2 * pad - reach) // stride + 1)
    return sizes
