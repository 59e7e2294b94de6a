"""Which backend was measured fastest, by GPU and bucket of sizes.

`tables/<gpu>.json` is made from a GPU report by `python -m bench.gpu.dispatch_table`.  A row holds an op, a precision,
the powers of two nearest to E, B, I and O, and the backend.  Without a table for a GPU, rows of the op in that
precision, or one near the sizes, the rules of `_dispatch` decide.
"""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from math import log2
from pathlib import Path

import torch

from ._precision import uses_tf32

DIRECTORY = Path(__file__).with_name("tables")
NEAR = 4.0  # doublings in all: beyond, a row says nothing of the sizes asked for

Sizes = tuple[int, ...]  # E, B, I, O


def fastest(op: str, dtype: torch.dtype, sizes: Sizes, index: int | None = None) -> str | None:
    """The backend measured fastest for `op` near `sizes` on GPU `index`; None if that is not known."""
    return _nearest(_name(index), op, "tf32" if uses_tf32(dtype) else str(dtype).removeprefix("torch."), sizes)


@cache
def _name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache(maxsize=4096)
def _nearest(gpu: str, op: str, precision: str, sizes: Sizes) -> str | None:
    rows = table(gpu).get((op, precision))
    if not rows or min(sizes) < 1:
        return None
    place = tuple(log2(size) for size in sizes)
    distance, backend = min((sum(abs(a - b) for a, b in zip(place, row)), backend) for row, backend in rows)
    return backend if distance <= NEAR else None


def forget() -> None:
    """Read the tables again at the next call."""
    for cached in (_name, _nearest, table):
        cached.cache_clear()


@cache
def table(gpu: str) -> dict[tuple[str, str], list[tuple[tuple[float, ...], str]]]:
    """(op, precision) -> [(log2 of the sizes, backend)]."""
    path = DIRECTORY / f"{slug(gpu)}.json"
    if not path.exists():
        return {}
    found: dict[tuple[str, str], list[tuple[tuple[float, ...], str]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        place = tuple(log2(row[letter]) for letter in "EBIO")
        found.setdefault((row["op"], row["precision"]), []).append((place, row["backend"]))
    return found


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
