"""Triton building blocks where integers on the device say which matrices meet, or which rows are whose.

The host never reads them, and cannot check their values: what is out of range is never a place in memory.

    indexed    a group's number of a matrix: `load_number`, `of_group`; and `Segments`, the groups of each number
    ragged     the rows of a member: `member_rows`; and `rows_of_tile`, whose rows a tile of rows has
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------------------------------------------------------------------------ device: indexed


@triton.jit
def load_number(pointer, count):
    """(the number of a matrix, whether it is in 0 .. count - 1)."""
    number = tl.load(pointer).to(tl.int64)
    return number, (number >= 0) & (number < count)


@triton.jit
def of_group(source, number, stride, inside):
    """The operand `source` moved to the matrix of that number; all zero unless `inside`."""
    pointer, offsets, valid, along, group_stride = source
    inside = tl.zeros((1, 1), tl.int32) < inside.to(tl.int32)  # in the interpreter, `valid & inside` is no mask
    return pointer + number * stride, offsets, valid & inside, along, group_stride


# ------------------------------------------------------------------------------------------------ device: ragged


@triton.jit
def member_rows(offsets, member, rows):
    """(first row, number of rows) of a member."""
    first = _clamp(tl.load(offsets + member), rows)
    last = _clamp(tl.load(offsets + member + 1), rows)
    return first.to(tl.int64), tl.maximum(last - first, 0)


@triton.jit
def rows_of_tile(offsets, tile, rows, members, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr = 128):
    """(member, first row, number of rows) of one of `row_tiles` tiles: all of one member, and fewer than BLOCK_M at
    its end.  Rows before the first member's and after the last's come as those of members -1 and `members`.

    Such a segment, number i from 0 on, that begins at row a and ends at b, has the tiles from a // BLOCK_M + i on.  The
    next one's are b // BLOCK_M - a // BLOCK_M + 1 further, which is enough for b - a rows.  So no sum over members is
    needed to find a tile's; where rows do not need all tiles, some have none.
    """
    begun = tl.zeros((AT_ONCE,), tl.int32)
    for some in range(0, members + 1, AT_ONCE):
        i = some + tl.arange(0, AT_ONCE)
        start = _clamp(tl.load(offsets + i, mask=i <= members, other=0), rows)
        begun += ((i <= members) & (start // BLOCK_M + i < tile)).to(tl.int32)
    segment = tl.sum(begun, 0)
    start = _clamp(tl.load(offsets + segment - 1, mask=segment > 0, other=0), rows)
    end = _clamp(tl.load(offsets + segment, mask=segment <= members, other=2**31 - 1), rows)
    first = start + (tile - start // BLOCK_M - segment) * BLOCK_M
    return segment.to(tl.int64) - 1, first.to(tl.int64), tl.minimum(tl.maximum(end - first, 0), BLOCK_M)


@triton.jit
def row_tiles(rows, members, BLOCK_M: tl.constexpr):
    """How many tiles hold the rows of all members, and of none, whatever the offsets."""
    return tl.cdiv(rows, BLOCK_M) + members + 1


@triton.jit
def _clamp(offset, rows):
    return tl.minimum(tl.maximum(offset, 0), rows).to(tl.int32)


# ------------------------------------------------------------------------------------------------ host


class Segments(NamedTuple):
    """The groups that name each of `count` matrices: for matrix i, `groups[bounds[i]:bounds[i + 1]]`, ascending, and
    beside each the other matrix that it names."""

    groups: Tensor
    others: Tensor
    bounds: Tensor

    @staticmethod
    def of(index: Tensor, count: int, other_index: Tensor) -> Segments:
        """On the device, without waiting for it; groups whose number is out of range are in none."""
        numbers, groups = torch.sort(index, stable=True)
        each = torch.arange(count + 1, dtype=index.dtype, device=index.device)
        # Gathered here, since a load whose address another load gives costs a kernel's loop two stages.
        return Segments(groups, other_index[groups], torch.searchsorted(numbers, each, out_int32=True))
