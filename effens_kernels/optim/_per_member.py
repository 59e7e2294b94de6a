"""Hyperparameters with a value for each member, which PyTorch's schedulers can compute with and set."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._checks import reject


class PerMember(Tensor):
    """`[E]`, float64 on the CPU.

    PyTorch's schedulers set the learning rate that is a tensor by `fill_`, which takes a single number elsewhere.
    """

    @staticmethod
    def of(values: Tensor | Sequence[float]) -> PerMember:
        values = values.detach() if isinstance(values, Tensor) else values
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").clone().as_subclass(PerMember)

    def fill_(self, value: float | Tensor) -> PerMember:
        return self.copy_(torch.as_tensor(value, dtype=self.dtype))

    def __deepcopy__(self, memo: dict[int, object]) -> PerMember:
        return memo.setdefault(id(self), PerMember.of(self))


# So that a scheduler's state, which has copies of learning rates, loads with torch.load's weights_only.
torch.serialization.add_safe_globals([PerMember])


class Range(NamedTuple):
    """Numbers from `least` to below `below`, or to it `with_below`, in words: `what`."""

    least: float
    below: float
    what: str
    with_below: bool = False

    def has(self, value: float) -> bool:
        return self.least <= value < self.below or (self.with_below and value == self.below)


ANY = Range(-inf, inf, "a number")
LEAST_ZERO = Range(0.0, inf, "a number of at least 0")
BELOW_ONE = Range(0.0, 1.0, "a number from 0 to below 1")


def per_member(op: str, name: str, value: object, range: Range = ANY) -> float | PerMember:
    """A hyperparameter of all members, or of each, in range."""
    expected = f"{range.what} or [E] of them"
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex() or value.dim() > 1 or value.is_meta:
            reject(op, name, expected, value, TypeError if value.dim() <= 1 else ValueError)
        value = value.item() if value.dim() == 0 else PerMember.of(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if not all(_is_number(v) for v in value):
            reject(op, name, expected, repr(value), TypeError)
        value = PerMember.of([float(v) for v in value])
    elif not _is_number(value):
        reject(op, name, expected, repr(value), TypeError)
    else:
        value = float(value)
    if isinstance(value, PerMember) and not len(value):
        reject(op, name, expected, "none")
    for e, one in enumerate(value.tolist() if isinstance(value, PerMember) else [value]):
        if not range.has(one):
            reject(op, name, expected, f"{one}" + (f" at member {e}" if isinstance(value, PerMember) else ""))
    return value


def plain(value: object) -> object:
    """Without the class that only schedulers need."""
    if isinstance(value, PerMember):
        return value.as_subclass(Tensor)
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def _is_number(value: object) -> bool:
    """Of Python, NumPy or a tensor of one."""
    return hasattr(value, "__float__") and not isinstance(value, (bool, str)) and getattr(value, "ndim", 0) == 0
