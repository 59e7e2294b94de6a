"""Sample calls of the convolutions of members, for the tests, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from common import leaves
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import effens_kernels as ek

Inputs = list[Tensor | None]


@dataclass(frozen=True)
class ConvCase:
    """One sample call, readable as a test id such as `rank1-E3-B4-C6-O8-9x7-k3x3-shared-stride2`."""

    members: int = 3
    batch: int = 4
    inputs: int = 6
    outputs: int = 8
    image: tuple[int, ...] = (9, 7)
    kernel: tuple[int, ...] = (3, 3)
    shared: bool = False
    bias: str = "own"  # "own", "shared" or "none"
    op: str = "conv2d"
    layout: str = "contiguous"  # of x; "channels_last", "batch_first" or "cropped"
    weight_layout: str = "contiguous"
    options: dict = field(default_factory=dict, hash=False)

    FORM: ClassVar[str]  # prefix of the ops' names
    NAMES: ClassVar[tuple[str, ...]]  # of the tensors, x first, the bias last
    WEIGHTS: ClassVar[str]  # the one of NAMES whose last axes are those of one weight

    def __str__(self) -> str:
        sizes = [f"E{self.members}", f"B{self.batch}", f"C{self.inputs}", f"O{self.outputs}"]
        sizes += ["x".join(map(str, self.image)), "k" + "x".join(map(str, self.kernel))]
        parts = [self.FORM] + [self.op] * (self.op != "conv2d") + sizes + ["shared"] * self.shared
        parts += [f"bias_{self.bias}"] * (self.bias != "own") + [f"x_{self.layout}"] * (self.layout != "contiguous")
        parts += [f"w_{self.weight_layout}"] * (self.weight_layout != "contiguous")
        return "-".join(parts + [f"{name}{value}".replace(" ", "") for name, value in self.options.items()])

    @property
    def call(self) -> Callable[..., Tensor]:
        return getattr(ek, f"{self.FORM}_{self.op}")

    @property
    def plain(self) -> Callable[..., Tensor]:
        return getattr(F, self.op)

    def run(self, *inputs: Tensor | None, **options) -> Tensor:
        """The op; arguments that are not given are None, as the bias may be."""
        return self.call(*inputs, *[None] * (len(self.NAMES) - len(inputs)), **self.options, **options)

    def inputs_for(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """Random tensors in the order of NAMES, scaled so that outputs are of order 1."""
        raise NotImplementedError

    def member(self, inputs: Inputs, member: int) -> Tensor:
        """What the op is to compute for one member, without the bias, by PyTorch's convolution."""
        raise NotImplementedError

    def terms(self, name: str) -> int:
        """Upper bounds of how many products are summed into one element of the result `y` or of a gradient."""
        kernel = torch.Size(self.kernel).numel()
        return {
            "y": self.inputs * kernel,
            "x": self.outputs * kernel * self.members,
            "bias": self.pixels * self.members,
        }[name]

    @property
    def pixels(self) -> int:
        return 2 * torch.Size(self.image).numel() * self.batch

    def images(self, dtype: torch.dtype) -> Tensor:
        x = torch.randn(1 if self.shared else self.members, self.batch, self.inputs, *self.image).to(dtype)
        if self.layout == "batch_first":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif self.layout == "cropped":
            x = F.pad(x, (1, 2))[..., 1:-2]
        elif self.layout == "channels_last":
            x = laid_out(x.flatten(0, 1), self.layout).view(x.shape)
        return x[0] if self.shared else x

    def weights(self, dtype: torch.dtype, *leading: int) -> Tensor:
        groups = self.options.get("groups", 1)
        first, second = self.outputs, self.inputs // groups
        if "transpose" in self.op:
            first, second = self.inputs, self.outputs // groups
        terms = self.inputs // groups * torch.Size(self.kernel).numel()
        weights = torch.randn(*leading, first, second, *self.kernel).mul(terms**-0.5).to(dtype)
        return laid_out(weights, self.weight_layout, len(leading))

    def biases(self, dtype: torch.dtype) -> Tensor | None:
        units = (self.outputs,) if self.bias == "shared" else (self.members, self.outputs)
        return None if self.bias == "none" else torch.randn(units).to(dtype)


class Rank1ConvCase(ConvCase):
    FORM, NAMES, WEIGHTS = "rank1", ("x", "weight", "r", "s", "bias"), "weight"

    def inputs_for(self, dtype: torch.dtype = torch.float32) -> Inputs:
        r, s = (torch.randn(self.members, n).mul(0.5).add(1).to(dtype) for n in (self.inputs, self.outputs))
        return [self.images(dtype), self.weights(dtype), r, s, self.biases(dtype)]

    def member(self, inputs: Inputs, member: int) -> Tensor:
        x, weight, r, s = inputs[:4]
        r, s = (scale[member].view(-1, *(1 for _ in self.image)) for scale in (r, s))
        return self.plain((x if self.shared else x[member]) * r, weight, None, **self.options) * s

    def terms(self, name: str) -> int:
        kernel = torch.Size(self.kernel).numel()
        more = {
            "weight": self.pixels * self.members,
            "r": self.pixels * self.outputs * kernel,
            "s": self.pixels * self.inputs * kernel,
        }
        return more[name] if name in more else super().terms(name)


@dataclass(frozen=True)
class MixtureConvCase(ConvCase):
    templates: int = 5

    FORM, NAMES, WEIGHTS = "mixture", ("x", "coefficients", "templates", "bias"), "templates"

    def __str__(self) -> str:
        return super().__str__() + f"-T{self.templates}"

    def inputs_for(self, dtype: torch.dtype = torch.float32) -> Inputs:
        coefficients = torch.randn(self.members, self.templates).mul(self.templates**-0.5).to(dtype)
        return [self.images(dtype), coefficients, self.weights(dtype, self.templates), self.biases(dtype)]

    def member(self, inputs: Inputs, member: int) -> Tensor:
        x, coefficients, templates = inputs[:3]
        weight = sum(c * template for c, template in zip(coefficients[member], templates))
        return self.plain(x if self.shared else x[member], weight, None, **self.options)

    def terms(self, name: str) -> int:
        kernel = torch.Size(self.kernel).numel()
        more = {
            "coefficients": self.pixels * self.inputs * self.outputs * kernel,
            "templates": self.pixels * self.members,
        }
        return more[name] if name in more else super().terms(name) * (1 if name == "bias" else self.templates)


FORMS = (Rank1ConvCase, MixtureConvCase)


def laid_out(t: Tensor, layout: str, leading: int = 0) -> Tensor:
    if layout == "channels_last":
        return t.movedim(leading + 1, -1).contiguous().movedim(-1, leading + 1)
    if layout == "cropped":
        return F.pad(t, (1, 2))[..., 1:-2]
    return t.mT.contiguous().mT if layout == "inner" else t


def cases(form: type[ConvCase]) -> list[ConvCase]:
    """Every option, odd sizes, memory formats, and the siblings for other axes and directions."""
    found = [
        form(),
        form(shared=True, bias="shared"),
        form(bias="none"),
        form(members=1),
        form(members=1, shared=True, bias="none"),
        form(1, 1, 1, 1, (1, 1), (1, 1)),
        form(inputs=1, outputs=1),
        form(inputs=17, outputs=13, image=(11, 5), kernel=(1, 1)),
        form(inputs=5, outputs=3, image=(8, 8), kernel=(2, 4)),
        form(inputs=3, outputs=16, image=(7, 7), kernel=(7, 7), shared=True),
        form(11, 2, 40, 48, (6, 6)),  # more members than rank1_conv2d has weights of at a time
    ]
    several = [
        {"stride": 2},
        {"stride": (1, 3), "padding": (2, 1)},
        {"padding": 1, "dilation": 2},
        {"padding": (0, 2), "dilation": (1, 2)},
        {"groups": 2},
        {"groups": 2, "stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 1)},
        {"padding": "valid"},
        {"stride": [2], "padding": (1,)},
    ]
    for options in several:
        found += [form(options=options), form(shared=True, options=options, bias="shared")]
    found += [
        form(inputs=8, options={"groups": 8}),  # depthwise
        form(kernel=(4, 2), options={"padding": "same"}),  # uneven
        form(kernel=(2, 3), options={"padding": "same", "dilation": (3, 1)}, shared=True),
    ]
    for layout in ("channels_last", "batch_first", "cropped"):
        found += [form(layout=layout), form(layout=layout, shared=True, options={"padding": 1})]
    found += [
        form(layout="channels_last", weight_layout="channels_last", options={"stride": 2}),
        form(weight_layout="channels_last", options={"groups": 2}),
        form(kernel=(1, 1), layout="channels_last", weight_layout="channels_last"),
        form(kernel=(1, 1), layout="channels_last", shared=True, bias="shared"),
        form(kernel=(1, 1), layout="channels_last", options={"padding": 1}),
        form(kernel=(1, 1), layout="channels_last", options={"groups": 2}, bias="none"),
        form(inputs=1, kernel=(1, 1), layout="channels_last"),
        form(weight_layout="inner"),
        form(weight_layout="cropped"),
    ]
    line = {"image": (13,), "kernel": (3,), "op": "conv1d"}
    found += [
        form(**line),
        form(**line, shared=True, options={"stride": 2, "padding": 1, "groups": 2}),
        form(**line, options={"padding": "same", "dilation": 2}, weight_layout="channels_last"),
    ]
    for options in ({}, {"stride": 2, "output_padding": 1}, {"groups": 2, "padding": (1, 0), "dilation": (1, 2)}):
        found += [
            form(op="conv_transpose2d", options=options),
            form(op="conv_transpose2d", options=options, shared=True),
        ]
    found += [form(op="conv_transpose2d", layout="channels_last", weight_layout="channels_last")]
    return found


def empty_cases(form: type[ConvCase]) -> list[ConvCase]:
    return [
        form(batch=0),
        form(batch=0, shared=True, options={"groups": 2}),
        form(members=0),
        form(members=0, shared=True, bias="shared"),
        form(members=0, batch=0),
        form(members=0, op="conv_transpose2d", options={"groups": 2, "stride": 2}),
        form(members=1, batch=0, layout="channels_last"),
        form(batch=0, kernel=(1, 1), layout="channels_last"),
    ]


def small_cases(form: type[ConvCase]) -> list[ConvCase]:
    """For finite differences."""
    found = [
        form(2, 1, 2, 2, (2, 3), (2, 2), options={"padding": 1}),
        form(2, 2, 2, 2, (3, 3), (3, 2), shared=True, bias="shared", options={"stride": 2, "padding": 1}),
        form(1, 1, 4, 2, (3, 3), (2, 2), bias="none", options={"groups": 2}, layout="channels_last"),
        form(2, 1, 2, 2, (4, 3), (2, 3), options={"padding": "same"}),
        form(2, 2, 3, 2, (2, 2), (1, 1), layout="channels_last"),
        form(2, 2, 3, 2, (2, 2), (1, 1), layout="channels_last", shared=True, bias="shared"),
        form(2, 2, 2, 2, (4,), (2,), op="conv1d"),
        form(2, 1, 2, 2, (2, 2), (2, 2), op="conv_transpose2d", options={"groups": 2, "stride": 2}),
    ]
    return [replace(case, templates=2) if isinstance(case, MixtureConvCase) else case for case in found]


def derivatives(case: ConvCase, inputs: Inputs, grad: Tensor | None = None, **options) -> dict[str, Tensor]:
    """The result, "y", and gradients by name, of the sum of y or for dL/dy = grad."""
    inputs = leaves(inputs)
    y = case.run(*inputs, **options)
    named = {name: t for name, t in zip(case.NAMES, inputs) if t is not None}
    grads = torch.autograd.grad(y, list(named.values()), torch.ones_like(y) if grad is None else grad)
    return {"y": y.detach(), **dict(zip(named, grads))}


def widened(inputs: Inputs) -> Inputs:
    return [None if t is None else t.double() for t in inputs]


def kept_by(call: Callable[[], object]) -> list[Tensor]:
    """What autograd keeps of a call."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept
