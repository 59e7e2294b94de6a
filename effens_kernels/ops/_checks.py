"""Argument checks that every op shares.  Each message names the op, the argument, what was expected and what came."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch._C import _functorch

from ._activations import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def reject(op: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    got = got if isinstance(got, str) else describe(got)
    raise error(f"{op}: {argument} should be {expected}, got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        reject(op, argument, "a torch.Tensor", value, TypeError)
    if value.dtype not in DTYPES:
        reject(op, argument, "a float32, float16, bfloat16 or float64 tensor", value, TypeError)
    if value.layout is not torch.strided:
        reject(op, argument, "a dense (strided) tensor", f"layout {value.layout}", TypeError)


def check_alike(op: str, first: str, a: Tensor, argument: str, b: Tensor) -> None:
    """Same dtype and device as the first argument."""
    if a.dtype != b.dtype:
        reject(op, argument, f"{a.dtype} like {first}", describe(b), TypeError)
    if a.device != b.device:
        reject(op, argument, f"on {a.device} like {first}", describe(b))


def check_activation(op: str, activation: object, argument: str = "activation") -> None:
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        choices = ", ".join(repr(name) for name in ACTIVATIONS)
        reject(op, argument, f"one of {choices}", repr(activation))


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What `torch.nn.functional.linear` does under autocast: floating inputs other than float64 go to its dtype."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def check_index(op: str, argument: str, value: object, x: Tensor) -> None:
    """A vector of integers on x's device; of its values, see below."""
    if not isinstance(value, Tensor):
        reject(op, argument, "a torch.Tensor", value, TypeError)
    if value.dtype not in (torch.int32, torch.int64):
        reject(op, argument, "an int32 or int64 tensor", value, TypeError)
    if value.layout is not torch.strided:
        reject(op, argument, "a dense (strided) tensor", f"layout {value.layout}", TypeError)
    if value.dim() != 1:
        reject(op, argument, "of one dimension", value)
    if value.device != x.device:
        reject(op, argument, f"on {x.device} like x", describe(value))


def has_values(index: Tensor) -> bool:
    """Whether Python may look at them: on a GPU it would wait, and a tracer has none."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return index.is_cpu and type(index) is Tensor and not _functorch.is_functorch_wrapped_tensor(index)


def check_range(op: str, argument: str, index: Tensor, size: int, of: str) -> None:
    """Values in 0 .. size - 1, where they can be seen; else the kernels see to it."""
    if not has_values(index):
        return
    for position in ((index < 0) | (index >= size)).nonzero()[:1, 0].tolist():
        expected = f"in 0..{size - 1}, of {of}" if size else f"empty, as there is none of {of}"
        reject(op, argument, expected, f"{int(index[position])} at position {position}")


def check_offsets(op: str, offsets: Tensor, rows: int) -> None:
    """From 0 to `rows`, never decreasing, where values can be seen."""
    if not has_values(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0:
        reject(op, "offsets", "0 at position 0", str(values[0]))
    for position, (before, value) in enumerate(zip(values, values[1:]), 1):
        if value < before:
            reject(op, "offsets", f"at least {before} at position {position}, as before it", str(value))
    if values[-1] != rows:
        reject(op, "offsets", f"N={rows} at position {len(values) - 1}, the last", str(values[-1]))
