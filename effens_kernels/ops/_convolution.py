"""What the convolutions of members share: options as `torch.convolution` takes them, and checks of sizes.

The argument that has the weights (`weight`, `templates`) ends in the axes of one weight, [O, C / groups, *kernel] or
transposed [C, O / groups, *kernel].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch.nn.functional as F
from torch import Tensor

from ._checks import check_alike, check_tensor, reject

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


# ------------------------------------------------------------------------------------------------------- options


def read(
    op: str,
    x: Tensor,
    kernel: Sequence[int],
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
) -> tuple[Tensor, Options]:
    """Options of `torch.nn.functional.conv1d` and so on; x is padded where padding="same" is uneven."""
    axes = len(kernel)
    stride, dilation = numbers(op, "stride", stride, axes, 1), numbers(op, "dilation", dilation, axes, 1)
    (groups,) = numbers(op, "groups", groups, 1, 1)
    x, padding = padded(op, x, kernel, padding, stride, dilation)
    return x, Options(stride, padding, dilation, False, (0,) * axes, groups)


def read_transposed(
    op: str,
    axes: int,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Options:
    """Options of `torch.nn.functional.conv_transpose2d` and so on, in their order."""
    steps = numbers(op, "stride", stride, axes, 1)
    options = Options(
        steps,
        numbers(op, "padding", padding, axes, 0),
        numbers(op, "dilation", dilation, axes, 1),
        True,
        numbers(op, "output_padding", output_padding, axes, 0),
        numbers(op, "groups", groups, 1, 1)[0],
    )
    for extra, step, dilated in zip(options.output_padding, options.stride, options.dilation):
        if extra >= max(step, dilated):
            expected = f"less than stride {options.stride} or dilation {options.dilation}"
            reject(op, "output_padding", expected, repr(output_padding))
    return options


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
    op: str,
    x: Tensor,
    kernel: Sequence[int],
    padding: Numbers | str,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
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
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    odd = [n % 2 for n in total]
    if any(odd):
        x = F.pad(x, [amount for n in reversed(odd) for amount in (0, n)])
    return x, tuple(n // 2 for n in total)


def output_sizes(image: Sequence[int], kernel: Sequence[int], options: Options) -> list[int]:
    """Spatial sizes of the result."""
    sizes = []
    for n, k, stride, pad, dilation, extra in zip(
        image, kernel, options.stride, options.padding, options.dilation, options.output_padding
    ):
        reach = dilation * (k - 1) + 1
        if options.transposed:
            sizes.append((n - 1) * stride - 2 * pad + reach + extra)
        else:
            sizes.append((n + 2 * pad - reach) // stride + 1)
    return sizes


# -------------------------------------------------------------------------------------------------------- checks


def check_tensors(op: str, axes: int, named: dict[str, Tensor | None], weights: str, leading: str = "") -> None:
    """What options cannot change: types, and the ranks of x, the first of `named`, and of the argument `weights`.

    `leading` names the axes of that argument before those of one weight, as "T, ".
    """
    x = next(iter(named.values()))
    for name, tensor in named.items():
        if tensor is not None or name != "bias":
            check_tensor(op, name, tensor)
            check_alike(op, "x", x, name, tensor)
    image, kernel = ("L", "k") if axes == 1 else ("H, W", "kh, kw")
    channels = "C, O / groups" if "transpose" in op else "O, C / groups"
    if named[weights].dim() != axes + 2 + leading.count(",") or 0 in named[weights].shape:
        reject(op, weights, f"[{leading}{channels}, {kernel}], none of them 0", named[weights])
    if x.dim() not in (axes + 2, axes + 3):
        reject(op, "x", f"[B, C, {image}] or [E, B, C, {image}]", x)


class Call(NamedTuple):
    """One call, whose options have been read; `name` is that of the argument `weights`."""

    op: str
    x: Tensor
    weights: Tensor
    name: str
    options: Options

    def unfit(self, argument: str, expected: str, got: Tensor) -> NoReturn:
        """Reject what does not fit the weights."""
        weights = f"{self.name} {list(self.weights.shape)} with groups={self.options.groups}"
        reject(self.op, argument, f"{expected} to fit {weights}", got)

    def channels(self) -> tuple[int, int]:
        """Of an input and of an output image; groups and x are checked."""
        axes = len(self.options.stride)
        outputs, inputs = self.weights.shape[-axes - 2 : self.weights.dim() - axes]
        if outputs % self.options.groups:
            owner = self.name + ("'" if self.name.endswith("s") else "'s")
            reject(self.op, "groups", f"a divisor of {owner} {outputs} channels", repr(self.options.groups))
        inputs *= self.options.groups
        if self.options.transposed:
            inputs, outputs = outputs, inputs
        if self.x.shape[-axes - 1] != inputs:
            self.unfit("x", f"of C={inputs} channels (axis {-axes - 1})", self.x)
        return inputs, outputs

    def check(self, members: int, given_by: str, outputs: int, bias: Tensor | None) -> None:
        """The members and the size of x, and the bias; `given_by` describes what has the number of members."""
        axes = len(self.options.stride)
        if self.x.dim() == axes + 3 and self.x.shape[0] != members:
            reject(self.op, "x", f"images of E={members} members (axis 0) to fit {given_by}", self.x)
        if bias is not None and list(bias.shape) not in ([outputs], [members, outputs]):
            reject(self.op, "bias", f"[O={outputs}] or [E={members}, O={outputs}]", bias)
        if min(output_sizes(self.x.shape[-axes:], self.weights.shape[-axes:], self.options)) < 1:
            around = f"padding {self.options.padding} and dilation {self.options.dilation}"
            weights = f"{self.name} {list(self.weights.shape)}"
            reject(self.op, "x", f"large enough for {weights}, {around} to leave a pixel", self.x)
