"""What tests/ and bench/ share: one table of ops with sample inputs, one tolerance rule, one list of workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from random import Random

import torch
from torch import Tensor

from . import _dispatch
from .ops import (
    grouped_linear,
    indexed_linear,
    mix_templates,
    mixture_linear,
    multihead_linear,
    ragged_linear,
    rank1_linear,
)
from .ops._activations import ACTIVATIONS
from .ops.grouped_linear import reference as _grouped
from .ops.indexed_linear import reference as _indexed
from .ops.mix_templates import reference as _mixing
from .ops.mixture_linear import reference as _mixture
from .ops.multihead_linear import reference as _multihead
from .ops.ragged_linear import reference as _ragged
from .ops.rank1_linear import reference as _rank1

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNEL_BACKENDS = tuple(b for b in _dispatch.BACKENDS if b != "reference")


# ------------------------------------------------------------------------------------------------- tolerance


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error relative to the largest exact value; 0 for empty tensors, inf where one is not finite."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)} should be {list(exact.shape)}")
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double().cpu() - exact.cpu()).abs().max().item()
    scale = exact.abs().max().item()
    relative = difference / scale if scale > 0 else difference
    return relative if relative == relative else float("inf")


def assert_accurate(actual: Tensor, exact: Tensor, composition: Tensor, name: str = "result", terms: int = 1) -> None:
    """The tolerance rule: error against float64 at most twice that of the same-dtype PyTorch composition.

    Granted besides, so that a composition that happens to be exact does not demand exactness: one unit of the dtype
    at the largest value, and twice the square root of as many units of the accumulation's dtype as a sum has terms.
    """
    if actual.dtype != composition.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype} should be {composition.dtype}")
    ours, theirs = error(actual, exact), error(composition, exact)
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(actual.dtype).eps + 2 * torch.finfo(accumulation).eps * max(1, terms) ** 0.5
    if not ours <= 2 * theirs + rounding:
        raise AssertionError(f"{name}: error {ours:.3g} against float64, the composition has {theirs:.3g}")


# ---------------------------------------------------------------------------------------------- sample inputs


def strided(
    shape: tuple[int, ...], layout: str, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Random values in the memory layout named: what users pass is not always contiguous."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device, dtype)

    if layout == "contiguous":
        return normal(*shape)
    if layout == "transposed":  # [B, E, I] storage
        return normal(*reversed(shape[:-1]), shape[-1]).movedim(-2, 0) if len(shape) > 2 else normal(*shape[::-1]).mT
    if layout == "inner":  # the last two axes swapped: the feature axis is not contiguous
        return normal(*shape[:-2], shape[-1], shape[-2]).mT
    if layout == "stepped":  # every second feature of a wider tensor, at a storage offset
        return normal(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "offset":  # rows of a wider tensor, at an odd storage offset
        return normal(*shape[:-1], shape[-1] + 3)[..., 3:]
    raise ValueError(f"layout should be contiguous, transposed, inner, stepped or offset, got {layout!r}")


@dataclass(frozen=True)
class LinearCase:
    """One sample call of grouped_linear, readable as a test id such as `E5-B17-I3-O64-shared-relu`."""

    members: int
    batch: int
    inputs: int
    outputs: int
    shared: bool = False
    bias: bool = True
    activation: str | None = None
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    heads: int | None = None

    def __str__(self) -> str:
        parts = [f"E{self.members}", f"B{self.batch}", f"I{self.inputs}", f"O{self.outputs}"]
        parts += [f"H{self.heads}"] * (self.heads is not None)
        parts += ["shared"] * self.shared + ["nobias"] * (not self.bias) + [self.activation] * bool(self.activation)
        parts += [f"x_{self.x_layout}"] * (self.x_layout != "contiguous")
        parts += [f"w_{self.weight_layout}"] * (self.weight_layout != "contiguous")
        return "-".join(parts)

    def inputs_for(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fresh random (x, weight, bias), scaled so that outputs are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        rows = (self.batch, self.inputs) if self.shared else (self.members, self.batch, self.inputs)
        units = (self.members,) if self.heads is None else (self.members, self.heads)
        if self.heads is not None and self.members == 0:  # heads on one trunk, without members
            units, rows = (self.heads,), (self.batch, self.inputs)
        x = strided(rows, self.x_layout, generator, dtype, device)
        weight = strided((*units, self.outputs, self.inputs), self.weight_layout, generator, dtype, device)
        weight.mul_(max(1, self.inputs) ** -0.5)
        bias = strided((*units, self.outputs), "contiguous", generator, dtype, device) if self.bias else None
        return x, weight, bias

    def terms(self) -> dict[str, int]:
        """How many products are summed into one element of the output and of each gradient."""
        outputs = self.outputs * (self.heads or 1) * (self.members if self.shared else 1)
        return {"y": self.inputs, "x": outputs, "weight": self.batch, "bias": self.batch}

    def options(self) -> dict[str, str | None]:
        return {} if self.heads is not None else {"activation": self.activation}


@dataclass(frozen=True)
class Rank1Case(LinearCase):
    """One sample call of rank1_linear, readable as a test id such as `E5-B17-I3-O64-shared-relu-onebias`."""

    shared_bias: bool = False
    scale_layout: str = "contiguous"  # of r and s

    def __str__(self) -> str:
        parts = [super().__str__()] + ["onebias"] * self.shared_bias
        return "-".join(parts + [f"rs_{self.scale_layout}"] * (self.scale_layout != "contiguous"))

    def inputs_for(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Fresh random (x, weight, r, s, bias), scaled so that outputs are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        rows = (self.batch, self.inputs) if self.shared else (self.members, self.batch, self.inputs)
        x = strided(rows, self.x_layout, generator, dtype, device)
        weight = strided((self.outputs, self.inputs), self.weight_layout, generator, dtype, device)
        weight.mul_(max(1, self.inputs) ** -0.5)
        r = strided((self.members, self.inputs), self.scale_layout, generator, dtype, device)
        s = strided((self.members, self.outputs), self.scale_layout, generator, dtype, device)
        units = (self.outputs,) if self.shared_bias else (self.members, self.outputs)
        bias = strided(units, "contiguous", generator, dtype, device) if self.bias else None
        return x, weight, r, s, bias

    def terms(self) -> dict[str, int]:
        rows = self.members * self.batch
        return {
            "y": self.inputs,
            "x": self.outputs * (self.members if self.shared else 1),
            "weight": rows,
            "r": self.batch * self.outputs,
            "s": self.batch * self.inputs,
            "bias": rows if self.shared_bias else self.batch,
        }


def _integers(values: list[int], layout: str) -> Tensor:
    """As int64, or every second one of int32."""
    if layout == "contiguous":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor([values, values], dtype=torch.int32).T.flatten()[::2]


def _stacked_inputs(
    case: IndexedCase | RaggedCase,
    rows: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = strided(rows, case.x_layout, generator, dtype, device)
    weight = strided((case.members, case.outputs, case.inputs), case.weight_layout, generator, dtype, device)
    weight.mul_(max(1, case.inputs) ** -0.5)
    units = (case.outputs,) if case.shared_bias else (case.members, case.outputs)
    bias = strided(units, "contiguous", generator, dtype, device) if case.bias else None
    return x, weight, bias


@dataclass(frozen=True)
class IndexedCase(LinearCase):
    """One sample call of indexed_linear, readable as a test id such as `E5-B17-I3-O64-P2-G9-relu`.

    Its groups, which repeat some pairs and leave out others, are the same whenever it is called.
    """

    sources: int = 1  # P
    groups: int = 0
    shared_bias: bool = False
    index_layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [super().__str__(), f"P{self.sources}", f"G{self.groups}"] + ["onebias"] * self.shared_bias
        return "-".join(parts + ["narrow"] * (self.index_layout != "contiguous"))

    def inputs_for(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fresh random (x, weight, bias), scaled so that outputs are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        return _stacked_inputs(self, (self.sources, self.batch, self.inputs), generator, dtype, device)

    def numbers(self) -> tuple[list[int], list[int]]:
        """Of the inputs and of the weights."""
        draw = Random(f"{self.sources} {self.members} {self.groups}")
        return tuple([draw.randrange(count) for _ in range(self.groups)] for count in (self.sources, self.members))

    def terms(self) -> dict[str, int]:
        of_input, of_weight = (max(map(line.count, line), default=0) for line in self.numbers())
        bias = self.batch * (self.groups if self.shared_bias else of_weight)
        return {"y": self.inputs, "x": self.outputs * of_input, "weight": self.batch * of_weight, "bias": bias}

    def options(self) -> dict[str, str | Tensor | None]:
        x_index, weight_index = (_integers(line, self.index_layout) for line in self.numbers())
        return {"activation": self.activation, "x_index": x_index, "weight_index": weight_index}


@dataclass(frozen=True)
class RaggedCase(LinearCase):
    """One sample call of ragged_linear, with N for B, readable as a test id such as `E5-B17-I3-O64-relu-one_member`.

    Its offsets, of which some leave a member without rows, are the same whenever it is called.
    """

    one_member: bool = False  # that has all rows
    shared_bias: bool = False
    index_layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [super().__str__()] + ["one_member"] * self.one_member + ["onebias"] * self.shared_bias
        return "-".join(parts + ["narrow"] * (self.index_layout != "contiguous"))

    def inputs_for(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fresh random (x, weight, bias), scaled so that outputs are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        return _stacked_inputs(self, (self.batch, self.inputs), generator, dtype, device)

    def ends(self) -> list[int]:
        draw = Random(f"{self.members} {self.batch}")
        if self.one_member:
            first = draw.randrange(self.members)
            return [0] * (first + 1) + [self.batch] * (self.members - first)
        inner = sorted(draw.choice([0, draw.randint(0, self.batch)]) for _ in range(self.members - 1))
        return [0, *inner, self.batch] if self.members else [0]

    def terms(self) -> dict[str, int]:
        ends = self.ends()
        most = max((b - a for a, b in zip(ends, ends[1:])), default=0)
        bias = self.batch if self.shared_bias else most
        return {"y": self.inputs, "x": self.outputs, "weight": most, "bias": bias}

    def options(self) -> dict[str, str | Tensor | None]:
        return {"activation": self.activation, "offsets": _integers(self.ends(), self.index_layout)}


@dataclass(frozen=True)
class MixtureCase(LinearCase):
    """One sample call of mixture_linear, readable as a test id such as `E5-B17-I3-O64-T4-shared-relu`."""

    templates: int = 3
    coefficient_layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [super().__str__(), f"T{self.templates}"]
        return "-".join(parts + [f"c_{self.coefficient_layout}"] * (self.coefficient_layout != "contiguous"))

    def inputs_for(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Fresh random (x, coefficients, templates, bias), scaled so that outputs are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        rows = (self.batch, self.inputs) if self.shared else (self.members, self.batch, self.inputs)
        x = strided(rows, self.x_layout, generator, dtype, device)
        mixing = strided((self.members, self.templates), self.coefficient_layout, generator, dtype, device)
        mixing.mul_(self.templates**-0.5)
        shape = (self.templates, self.outputs, self.inputs)
        templates = strided(shape, self.weight_layout, generator, dtype, device)
        templates.mul_(max(1, self.inputs) ** -0.5)
        bias = strided((self.members, self.outputs), "contiguous", generator, dtype, device) if self.bias else None
        return x, mixing, templates, bias

    def terms(self) -> dict[str, int]:
        return {
            "y": self.inputs * self.templates,
            "x": self.outputs * self.templates * (self.members if self.shared else 1),
            "coefficients": self.batch * self.outputs * self.inputs,
            "templates": self.batch * self.members,
            "bias": self.batch,
        }


@dataclass(frozen=True)
class MixCase:
    """One sample call of mix_templates, readable as a test id such as `M4x2-T3-64x32x3x3`."""

    leading: tuple[int, ...]
    templates: int
    shape: tuple[int, ...]
    layout: str = "contiguous"  # of the templates: as for `strided`, or channels_last
    coefficient_layout: str = "contiguous"
    activation: None = None

    def __str__(self) -> str:
        sizes = ("x".join(map(str, axes)) or "scalar" for axes in (self.leading, self.shape))
        parts = "M{1}-T{0}-{2}".format(self.templates, *sizes)
        parts += f"-{self.layout}" * (self.layout != "contiguous")
        return parts + f"-c_{self.coefficient_layout}" * (self.coefficient_layout != "contiguous")

    @property
    def rows(self) -> int:
        return prod(self.leading)

    @property
    def columns(self) -> int:
        return prod(self.shape)

    def inputs_for(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fresh random (coefficients, templates), scaled so that weights are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        shape = (self.templates, *self.shape)
        if self.layout == "channels_last":
            last = (self.templates, self.shape[0], *self.shape[2:], self.shape[1])
            templates = strided(last, "contiguous", generator, dtype, device).movedim(-1, 2)
        else:
            templates = strided(shape, self.layout, generator, dtype, device)
        mixing = strided((*self.leading, self.templates), self.coefficient_layout, generator, dtype, device)
        return mixing.mul_(self.templates**-0.5), templates

    def terms(self) -> dict[str, int]:
        return {"y": self.templates, "coefficients": self.columns, "templates": self.rows}

    def options(self) -> dict[str, str | None]:
        return {}


def _linear_cases() -> Iterator[LinearCase]:
    for batch, inputs, outputs in [
        (1, 1, 1),
        (1, 17, 3),
        (3, 1, 17),
        (17, 3, 123),
        (33, 123, 1),
        (7, 64, 20),
        (64, 31, 37),
        (2, 129, 65),
    ]:
        yield LinearCase(3, batch, inputs, outputs)
    for activation in ACTIVATIONS:
        yield LinearCase(2, 19, 23, 29, activation=activation)
        yield LinearCase(3, 11, 16, 33, shared=True, activation=activation)
    yield LinearCase(1, 13, 17, 19)
    yield LinearCase(1, 13, 17, 19, shared=True, bias=False)
    yield LinearCase(5, 8, 12, 7, bias=False)
    yield LinearCase(37, 3, 5, 2, shared=True)
    yield LinearCase(6, 5, 24, 1, shared=True, activation="relu")
    for layout in ("transposed", "inner", "stepped", "offset"):
        yield LinearCase(4, 9, 21, 18, activation="relu", x_layout=layout)
        yield LinearCase(4, 9, 21, 18, shared=True, activation="gelu", x_layout=layout)
        yield LinearCase(4, 9, 21, 18, activation="tanh", weight_layout=layout)
    for members, batch, inputs, outputs in [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0), (0, 0, 0, 0)]:
        for shared in (False, True):
            yield LinearCase(members, batch, inputs, outputs, shared=shared, activation="relu")
            yield LinearCase(members, batch, inputs, outputs, shared=shared, activation="gelu")


def _large_linear_cases() -> Iterator[LinearCase]:
    """Beyond one cache block of every kernel in rows, inputs and outputs; too long for the Triton interpreter."""
    yield LinearCase(2, 300, 700, 150, activation="relu")
    yield LinearCase(2, 130, 90, 1100, shared=True, activation="gelu")
    yield LinearCase(3, 1300, 65, 70, shared=True)
    yield LinearCase(1, 260, 1030, 515, x_layout="inner", weight_layout="inner")


def _head_cases() -> Iterator[LinearCase]:
    yield LinearCase(3, 9, 17, 4, heads=5)
    yield LinearCase(3, 9, 17, 4, heads=5, shared=True, bias=False)
    yield LinearCase(0, 11, 33, 1, heads=7)  # one trunk, no member axis
    yield LinearCase(4, 6, 20, 3, heads=2, x_layout="transposed")
    yield LinearCase(2, 0, 5, 3, heads=2)


def _rank1_cases() -> Iterator[Rank1Case]:
    for batch, inputs, outputs in [(1, 1, 1), (1, 17, 3), (3, 1, 17), (33, 123, 1), (7, 64, 20), (64, 31, 37)]:
        yield Rank1Case(3, batch, inputs, outputs)
    for activation in ACTIVATIONS:
        yield Rank1Case(2, 19, 23, 29, activation=activation)
        yield Rank1Case(3, 11, 16, 33, shared=True, activation=activation, shared_bias=True)
    yield Rank1Case(1, 13, 17, 19)
    yield Rank1Case(1, 13, 17, 19, shared=True, bias=False)
    yield Rank1Case(5, 8, 12, 7, bias=False)
    yield Rank1Case(37, 3, 5, 2, shared=True, shared_bias=True)
    for layout in ("transposed", "inner", "stepped", "offset"):
        yield Rank1Case(4, 9, 21, 18, activation="relu", x_layout=layout, scale_layout=layout)
        yield Rank1Case(4, 9, 21, 18, shared=True, activation="gelu", x_layout=layout)
        yield Rank1Case(4, 9, 21, 18, activation="tanh", weight_layout=layout, shared_bias=True)
    for members, batch, inputs, outputs in [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0), (0, 0, 0, 0)]:
        for shared in (False, True):
            yield Rank1Case(members, batch, inputs, outputs, shared=shared, activation="relu")
            yield Rank1Case(members, batch, inputs, outputs, shared=shared, activation="gelu", shared_bias=True)


def _large_rank1_cases() -> Iterator[Rank1Case]:
    """Beyond one cache block of every kernel in rows, inputs and outputs; too long for the Triton interpreter."""
    yield Rank1Case(2, 300, 700, 150, activation="relu")
    yield Rank1Case(2, 130, 90, 1100, shared=True, activation="gelu")
    yield Rank1Case(9, 430, 65, 70, shared=True, shared_bias=True)
    yield Rank1Case(1, 260, 1030, 515, x_layout="inner", weight_layout="inner")


Case = LinearCase | MixCase


def _mix_cases() -> Iterator[MixCase]:
    for leading, templates, shape in [
        ((1,), 1, (1,)),
        ((3,), 5, (17,)),
        ((2, 3), 4, (8, 3, 3, 3)),
        ((4,), 3, (64, 33)),
        ((13,), 2, (129,)),
        ((7,), 11, (1000,)),
        ((33,), 17, (65,)),
        ((), 3, (5, 7)),
        ((4,), 3, ()),
    ]:
        yield MixCase(leading, templates, shape)
    yield MixCase((5,), 3, (6, 4, 3, 3), layout="channels_last")
    yield MixCase((5, 2), 3, (16, 4, 2, 2), layout="channels_last", coefficient_layout="transposed")
    for layout in ("transposed", "inner", "stepped", "offset"):
        yield MixCase((4,), 5, (9, 21), layout=layout)
        yield MixCase((4, 3), 5, (37,), coefficient_layout=layout)
    for leading, shape in [((0,), (3, 2)), ((2,), (0,)), ((2, 0), (4, 0))]:
        yield MixCase(leading, 3, shape)


def _large_mix_cases() -> Iterator[MixCase]:
    """Beyond one block of every kernel in each size; too long for the Triton interpreter."""
    yield MixCase((4,), 5, (40, 40, 3, 3))
    yield MixCase((3,), 2, (100_003,))
    yield MixCase((70,), 9, (3000,))
    yield MixCase((9,), 70, (3000,))
    yield MixCase((32,), 16, (130, 128))


def _mixture_cases() -> Iterator[MixtureCase]:
    yield MixtureCase(29, 1, 1, 1, templates=4)
    for batch, inputs, outputs in [(1, 17, 3), (3, 1, 17), (33, 123, 1), (7, 64, 20), (64, 31, 37)]:
        yield MixtureCase(3, batch, inputs, outputs, templates=4)
    for activation in ACTIVATIONS:
        yield MixtureCase(2, 19, 23, 29, activation=activation, templates=5)
        yield MixtureCase(3, 11, 16, 33, shared=True, activation=activation, templates=2)
    yield MixtureCase(1, 13, 17, 19, templates=1)
    yield MixtureCase(1, 13, 17, 19, shared=True, bias=False)
    yield MixtureCase(5, 8, 12, 7, bias=False, templates=9)
    yield MixtureCase(37, 3, 5, 2, shared=True)
    for layout in ("transposed", "inner", "stepped", "offset"):
        yield MixtureCase(4, 9, 21, 18, activation="relu", x_layout=layout, coefficient_layout=layout)
        yield MixtureCase(4, 9, 21, 18, shared=True, activation="gelu", x_layout=layout)
        yield MixtureCase(4, 9, 21, 18, activation="tanh", weight_layout=layout)
    for members, batch, inputs, outputs in [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0), (0, 0, 0, 0)]:
        for shared in (False, True):
            yield MixtureCase(members, batch, inputs, outputs, shared=shared, activation="relu")


def _large_mixture_cases() -> Iterator[MixtureCase]:
    """Beyond one cache block of every kernel in rows, inputs and outputs; too long for the Triton interpreter."""
    yield MixtureCase(2, 300, 700, 150, activation="relu", templates=3)
    yield MixtureCase(2, 130, 90, 1100, shared=True, activation="gelu", templates=2)
    yield MixtureCase(9, 6, 265, 270, shared=True, templates=12)
    yield MixtureCase(3, 2, 1030, 515, x_layout="inner", weight_layout="inner")


def _indexed_cases() -> Iterator[IndexedCase]:
    for batch, inputs, outputs in [(1, 1, 1), (1, 17, 3), (3, 1, 17), (33, 123, 1), (7, 64, 20), (64, 31, 37)]:
        yield IndexedCase(3, batch, inputs, outputs, sources=2, groups=5)
    for activation in ACTIVATIONS:
        yield IndexedCase(4, 19, 23, 29, activation=activation, sources=3, groups=7)
        yield IndexedCase(5, 11, 16, 33, activation=activation, groups=3, shared_bias=True)
    yield IndexedCase(1, 13, 17, 19, groups=1)
    yield IndexedCase(1, 13, 17, 19, sources=3, groups=4, bias=False, index_layout="narrow")
    yield IndexedCase(37, 3, 5, 2, sources=11, groups=90, activation="relu", index_layout="narrow")
    for layout in ("transposed", "inner", "stepped", "offset"):
        yield IndexedCase(4, 9, 21, 18, activation="relu", x_layout=layout, sources=3, groups=6)
        yield IndexedCase(4, 9, 21, 18, activation="tanh", weight_layout=layout, sources=3, groups=6)
    for members, batch, inputs, outputs in [(2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0)]:
        yield IndexedCase(members, batch, inputs, outputs, activation="relu", sources=3, groups=4)
        yield IndexedCase(members, batch, inputs, outputs, activation="gelu", sources=3, groups=4, shared_bias=True)
    for members, sources in [(2, 3), (0, 3), (2, 0), (0, 0)]:
        yield IndexedCase(members, 4, 3, 2, activation="gelu", sources=sources)


def _large_indexed_cases() -> Iterator[IndexedCase]:
    """Beyond one cache block of every kernel in rows, inputs and outputs; too long for the Triton interpreter."""
    yield IndexedCase(2, 300, 700, 150, activation="relu", sources=2, groups=3)
    yield IndexedCase(3, 130, 90, 1100, activation="gelu", groups=4)
    yield IndexedCase(9, 430, 65, 70, sources=4, groups=12, shared_bias=True)
    yield IndexedCase(2, 260, 1030, 515, x_layout="inner", weight_layout="inner", sources=2, groups=2)


def _ragged_cases() -> Iterator[RaggedCase]:
    for rows, inputs, outputs in [(1, 1, 1), (1, 17, 3), (3, 1, 17), (33, 123, 1), (17, 64, 20), (64, 31, 37)]:
        yield RaggedCase(3, rows, inputs, outputs)
    for activation in ACTIVATIONS:
        yield RaggedCase(4, 59, 23, 29, activation=activation)
        yield RaggedCase(5, 31, 16, 33, activation=activation, shared_bias=True)
    yield RaggedCase(1, 13, 17, 19)
    yield RaggedCase(3, 23, 17, 19, bias=False, one_member=True, index_layout="narrow")
    yield RaggedCase(37, 23, 5, 2, activation="relu", index_layout="narrow")
    for layout in ("transposed", "inner", "stepped", "offset"):
        yield RaggedCase(4, 29, 21, 18, activation="relu", x_layout=layout)
        yield RaggedCase(4, 29, 21, 18, activation="tanh", weight_layout=layout)
    for members, rows, inputs, outputs in [(0, 0, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0), (0, 0, 0, 0)]:
        yield RaggedCase(members, rows, inputs, outputs, activation="relu")
        yield RaggedCase(members, rows, inputs, outputs, activation="gelu", shared_bias=True)


def _large_ragged_cases() -> Iterator[RaggedCase]:
    """Beyond one cache block of every kernel in rows, inputs and outputs; too long for the Triton interpreter."""
    yield RaggedCase(3, 700, 700, 150, activation="relu")
    yield RaggedCase(2, 330, 90, 1100, activation="gelu", one_member=True)
    yield RaggedCase(9, 2430, 65, 70, shared_bias=True)
    yield RaggedCase(2, 460, 1030, 515, x_layout="inner", weight_layout="inner")


@dataclass(frozen=True)
class Op:
    """Everything that the generic tests and benchmarks need to know of an op."""

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    cases: tuple[Case, ...]
    large_cases: tuple[Case, ...] = field(default=())
    arguments: tuple[str, ...] = ("x", "weight", "bias")


def _on_their_device(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With tensors among the options, which a case makes on the CPU, where the first argument is."""

    def moved(x: Tensor, *tensors: Tensor | None, **options: object) -> Tensor:
        options = {name: o.to(x.device) if isinstance(o, Tensor) else o for name, o in options.items()}
        return call(x, *tensors, **options)

    return moved


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "grouped_linear",
            grouped_linear,
            _grouped.grouped_linear,
            tuple(_linear_cases()),
            tuple(_large_linear_cases()),
        ),
        Op(
            "indexed_linear",
            _on_their_device(indexed_linear),
            _on_their_device(_indexed.indexed_linear),
            tuple(_indexed_cases()),
            tuple(_large_indexed_cases()),
        ),
        Op(
            "ragged_linear",
            _on_their_device(ragged_linear),
            _on_their_device(_ragged.ragged_linear),
            tuple(_ragged_cases()),
            tuple(_large_ragged_cases()),
        ),
        Op("multihead_linear", multihead_linear, _multihead.multihead_linear, tuple(_head_cases())),
        Op(
            "rank1_linear",
            rank1_linear,
            _rank1.rank1_linear,
            tuple(_rank1_cases()),
            tuple(_large_rank1_cases()),
            ("x", "weight", "r", "s", "bias"),
        ),
        Op(
            "mix_templates",
            mix_templates,
            _mixing.mix_templates,
            tuple(_mix_cases()),
            tuple(_large_mix_cases()),
            ("coefficients", "templates"),
        ),
        Op(
            "mixture_linear",
            mixture_linear,
            _mixture.mixture_linear,
            tuple(_mixture_cases()),
            tuple(_large_mixture_cases()),
            ("x", "coefficients", "templates", "bias"),
        ),
    )
}


# ------------------------------------------------------------------------------------- workloads of the benchmarks


@dataclass(frozen=True)
class ForumWorkload:
    """The forum question's models: `heads` output layers of `actions` on MLPs of three hidden layers.

    Ensemble2 has a trunk per member; Ensemble1 one trunk for all members, and heads per member.
    """

    members: int
    heads: int
    batch: int
    state: int
    hidden: int
    actions: int
    shared_trunk: bool = False

    def __str__(self) -> str:
        model = "Ensemble1" if self.shared_trunk else "Ensemble2"
        return (
            f"{model}-E{self.members}-H{self.heads}-B{self.batch}-{self.state}-{self.hidden}-{self.hidden}-"
            f"{self.hidden}-{self.actions}"
        )

    def layers(self) -> list[tuple[int, int]]:
        """(I, O) of each product, the heads as one."""
        widths = [self.state, self.hidden, self.hidden, self.hidden, self.heads * self.actions]
        return list(zip(widths, widths[1:]))


FORUM_WORKLOADS = tuple(
    ForumWorkload(*sizes, shared_trunk=shared)
    for sizes in ((10, 5, 256, 8, 64, 4), (5, 10, 128, 17, 256, 6))
    for shared in (False, True)
)

LAYER_WORKLOADS = (
    LinearCase(4, 128, 64, 64),
    LinearCase(32, 128, 64, 64),
    LinearCase(10, 256, 256, 256),
    LinearCase(32, 1024, 128, 128),
    LinearCase(5, 128, 784, 128, shared=True, activation="relu"),
    LinearCase(8, 512, 512, 512, activation="relu"),
    LinearCase(4, 1024, 1024, 1024),
)

# Levels of a tree of sampled paths, from its root downwards, and a layer that routes inputs to few of many members.
INDEXED_WORKLOADS = (
    IndexedCase(4, 128, 64, 64, sources=4, groups=16, activation="relu"),
    IndexedCase(4, 128, 256, 256, sources=16, groups=32, activation="relu"),
    IndexedCase(5, 128, 784, 128, sources=1, groups=5, activation="relu"),
    IndexedCase(4, 512, 512, 512, sources=4, groups=12),
    IndexedCase(32, 64, 256, 256, sources=8, groups=16),
)

RAGGED_WORKLOADS = (
    RaggedCase(8, 1024, 64, 64),
    RaggedCase(10, 2560, 256, 256, activation="relu"),
    RaggedCase(64, 2048, 128, 128),
    RaggedCase(8, 4096, 512, 512, activation="relu"),
)


@dataclass(frozen=True)
class BatchEnsembleWorkload:
    """A BatchEnsemble MLP of these widths on data that all members see, or, with one layer, an inner layer of one."""

    members: int
    batch: int
    widths: tuple[int, ...]
    model: bool = True

    def __str__(self) -> str:
        kind = "MLP" if self.model else "layer"
        return f"{kind}-E{self.members}-B{self.batch}-{'-'.join(map(str, self.widths))}"

    def inputs_for(
        self, dtype: torch.dtype, device: torch.device | str, seed: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Random x and, for each layer, (weight, r, s, bias)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return strided(shape, "contiguous", generator, dtype, device)

        rows = (self.batch, self.widths[0]) if self.model else (self.members, self.batch, self.widths[0])
        layers = []
        for inputs, outputs in zip(self.widths, self.widths[1:]):
            weight = normal(outputs, inputs) * inputs**-0.5
            r, s = (1 + 0.3 * normal(self.members, size) for size in (inputs, outputs))
            layers.append((weight, r, s, 0.1 * normal(self.members, outputs)))
        return normal(*rows), layers


BATCHENSEMBLE_WORKLOADS = (
    BatchEnsembleWorkload(5, 128, (3072, 128, 128, 10)),
    BatchEnsembleWorkload(32, 256, (64, 256, 256, 256, 10)),
    BatchEnsembleWorkload(5, 128, (128, 128), model=False),
    BatchEnsembleWorkload(32, 256, (256, 256), model=False),
    BatchEnsembleWorkload(16, 256, (512, 512), model=False),
)


@dataclass(frozen=True)
class ConvWorkload:
    """A BatchEnsemble convolution of images of size x size; padding keeps their size at a stride of 1."""

    members: int
    batch: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    shared: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        name = f"E{self.members}-B{self.batch}-C{self.inputs}-O{self.outputs}-{self.size}x{self.size}-k{self.kernel}"
        name += f"-s{self.stride}" * (self.stride > 1) + "-shared" * self.shared
        return name + "-channels_last" * self.channels_last

    def inputs_for(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple[Tensor, ...]:
        """Random (x, weight, r, s, bias)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return strided(shape, "contiguous", generator, dtype, device)

        x, weight = self._images(normal), self._weights(normal)
        r, s = (1 + 0.3 * normal(self.members, channels) for channels in (self.inputs, self.outputs))
        return x, weight, r, s, 0.1 * normal(self.members, self.outputs)

    def _images(self, normal: Callable[..., Tensor]) -> Tensor:
        members = 1 if self.shared else self.members
        x = self._laid_out(normal(members * self.batch, self.inputs, self.size, self.size))
        return x if self.shared else x.unflatten(0, (self.members, self.batch))

    def _weights(self, normal: Callable[..., Tensor], count: int = 1) -> Tensor:
        """Below each other, as one weight of `count` times the output channels."""
        weights = normal(count * self.outputs, self.inputs, self.kernel, self.kernel)
        return self._laid_out(weights * (self.inputs * self.kernel**2) ** -0.5)

    def _laid_out(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t


@dataclass(frozen=True)
class MixtureConvWorkload(ConvWorkload):
    """The same of weights that are mixed of templates."""

    templates: int = 4

    def __str__(self) -> str:
        return f"{super().__str__()}-T{self.templates}"

    def inputs_for(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple[Tensor, ...]:
        """Random (x, coefficients, templates, bias)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return strided(shape, "contiguous", generator, dtype, device)

        templates = self._weights(normal, self.templates).unflatten(0, (self.templates, self.outputs))
        coefficients = normal(self.members, self.templates) * self.templates**-0.5
        return self._images(normal), coefficients, templates, 0.1 * normal(self.members, self.outputs)


CONV_WORKLOADS = (
    ConvWorkload(4, 32, 3, 64, 32, shared=True),
    ConvWorkload(4, 32, 64, 64, 32),
    ConvWorkload(4, 32, 128, 128, 16),
)

# As in wide residual networks for images of 32 x 32.
MIXTURE_CONV_WORKLOADS = (
    MixtureConvWorkload(4, 32, 16, 16, 32, templates=4),
    MixtureConvWorkload(4, 16, 64, 64, 16, templates=5),
    MixtureConvWorkload(4, 8, 160, 160, 16, templates=5),
    MixtureConvWorkload(4, 8, 320, 320, 8, templates=5),
)

MIX_WORKLOADS = (
    MixCase((4,), 4, (320, 320, 3, 3)),
    MixCase((4,), 5, (640, 640, 3, 3)),  # WRN-28-10's largest
    MixCase((8,), 16, (256, 256, 3, 3)),
    MixCase((10,), 8, (512, 512)),
    MixCase((32,), 16, (256, 256)),
)

MIXTURE_WORKLOADS = (
    MixtureCase(5, 128, 784, 128, shared=True, templates=3),
    MixtureCase(4, 128, 256, 256, templates=4),
    MixtureCase(8, 128, 512, 512, templates=4),
    MixtureCase(32, 8, 256, 256, templates=8),
    MixtureCase(32, 16, 512, 512, shared=True, templates=4),
)


@dataclass(frozen=True)
class PredictCase:
    """Logits of an ensemble of classifiers."""

    members: int
    batch: int
    classes: int

    def __str__(self) -> str:
        return f"E{self.members}-B{self.batch}-C{self.classes}"

    def inputs_for(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
        """Random logits of members that agree in part."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.classes)
        common = strided(shape, "contiguous", generator, torch.float32, device)
        return (2 * common + strided((self.members, *shape), "contiguous", generator, torch.float32, device)).to(dtype)


PREDICT_WORKLOADS = (
    PredictCase(5, 1024, 10),
    PredictCase(32, 4096, 10),
    PredictCase(10, 1024, 100),
    PredictCase(4, 256, 1000),
    PredictCase(32, 64, 1000),
)
