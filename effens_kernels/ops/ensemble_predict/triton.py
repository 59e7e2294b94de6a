"""ensemble_predict in Triton: one launch forward, three where rows are long; one backward.

With p_e = softmax(logits_e) and m the mean of the first n members' p, m' that of n - 1, sums go on member by member:

    sum_e (p_e - m)^2       by Welford's updates (1962)
    sum_e KL(p_e || m)      gains (n - 1) KL(m' || m) + KL(p_n || m)

and KL is a sum over classes of m phi(p / m), phi(x) = x log x - x + 1, of which no term is negative: members that
nearly agree have a mutual information that is not rounding errors.  A program has all classes of some rows and reads
logits once.  Rows that no tile has room for are read twice: for each member's largest logit, sum of exponentials and
argmax, and then some classes at a time; the rows' sums are in parts, which are added in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..triton_engine import _INTERPRETED, Block, Plan, capability, fill, launch, narrow

# Kernels keep the grouping of their arguments: tensors, sizes, strides, choices.
# fmt: off


@triton.jit
def divergence(d):
    """phi(1 + d), by its series where the closed form cancels."""
    x = tl.maximum(1 + d, 1e-37)
    series = 1 / 2 - d * (1 / 6 - d * (1 / 12 - d * (1 / 20 - d * (1 / 30 - d * (1 / 42 - d * (1 / 56 - d / 72))))))
    if _INTERPRETED:
        log = tl.log(x)
    else:  # one instruction, of an absolute error of 4e-7, in place of twenty
        log = libdevice.fast_logf(x)
    return tl.where(tl.abs(d) < 0.25, d * d * series, x * log - d)


@triton.jit
def log_or_zero(p):
    """log p; 0 for p = 0, by which it is multiplied."""
    return tl.log(tl.where(p == 0, 1.0, p))


@triton.jit
def row_offsets(block, rows, row_stride, WIDE: tl.constexpr, BLOCK_B: tl.constexpr):
    """(rows, which of them are there, offsets from the block's first row); those beyond the last one repeat it."""
    local = tl.arange(0, BLOCK_B)
    b = block * BLOCK_B + local
    local = tl.minimum(b, rows - 1) - block * BLOCK_B
    if WIDE:
        local = local.to(tl.int64)
    return b, b < rows, local * row_stride


@triton.jit
def class_offsets(class_stride, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    local = tl.arange(0, BLOCK_C)
    if WIDE:
        local = local.to(tl.int64)
    return local * class_stride


@triton.jit
def store_rows(entropy, expected_entropy, mutual_information, disagreement, b, valid,
               entropies, expected, mutual, agreeing, members):
    """`agreeing`: ordered pairs of members."""
    count = members.to(tl.float32)
    apart = 1 - agreeing / tl.maximum(count * (count - 1), 1.0)
    apart = tl.where(members > 1, apart, 0.0)
    tl.store(entropy + b, entropies, mask=valid)
    tl.store(expected_entropy + b, expected / count, mask=valid)
    tl.store(mutual_information + b, mutual / count, mask=valid)
    tl.store(disagreement + b, tl.where(entropies == entropies, apart, entropies), mask=valid)


@triton.jit(do_not_specialize=["members", "rows"])
def ensemble_predict_fwd_kernel(
    logits, largest, sums, votes, mean_probs, variance,
    entropy, expected_entropy, mutual_information, disagreement, parts,
    members, rows, classes, chunks,
    l_member, l_row, l_class,
    WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """All results of some rows; or, given largest, sums and votes [E, B], a chunk of classes of them and parts
    [4, chunks, B] of the others."""
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks
    b, row_valid, down = row_offsets(block, rows, l_row, WIDE, BLOCK_B)
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = down[:, None] + class_offsets(l_class, WIDE, BLOCK_C)[None, :]
    class_valid = (c < classes)[None, :]
    logits += tl.cast(block * BLOCK_B, tl.int64) * l_row + tl.cast(chunk * BLOCK_C, tl.int64) * l_class

    mean = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    counts = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    expected = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    mutual = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    following = tl.load(logits + offsets, mask=class_valid, other=float("-inf"))
    for e in range(0, members):
        z = following.to(tl.float32)
        onward = tl.cast(tl.minimum(e + 1, members - 1), tl.int64) * l_member
        following = tl.load(logits + onward + offsets, mask=class_valid, other=float("-inf"))
        if largest is None:
            top = tl.max(z, 1)
            vote = tl.min(tl.where(z == top[:, None], c[None, :], classes), 1)
            z = z - top[:, None]
            q = tl.exp(z)
            total = tl.sum(q, 1)
        else:
            at = tl.cast(e, tl.int64) * rows + b
            vote = tl.load(votes + at, mask=row_valid, other=0)
            z = z - tl.load(largest + at, mask=row_valid, other=0.0)[:, None]
            q = tl.exp(z)
            total = tl.load(sums + at, mask=row_valid, other=1.0)
        p = q * (1 / total)[:, None]
        expected -= p * tl.where(p == 0, 0.0, z - tl.log(total)[:, None])

        others = tl.cast(e, tl.float32)
        share = 1 / (others + 1)
        difference = p - mean
        step = difference * share
        mean += step
        squares += difference * difference * (others * share)
        counts += tl.where(c[None, :] == vote[:, None], 1.0, 0.0)
        none = mean < 1e-30  # what these could add is less
        d = step / tl.where(none, 1.0, mean)
        mutual += tl.where(none, 0.0, mean * (divergence(others * d) + others * divergence(-d)))

    results = (b.to(tl.int64) * classes)[:, None] + c[None, :]
    tl.store(mean_probs + results, mean, mask=row_valid[:, None] & class_valid)
    tl.store(variance + results, squares / members.to(tl.float32), mask=row_valid[:, None] & class_valid)
    entropies = -tl.sum(mean * log_or_zero(mean), 1)
    agreeing = tl.sum(counts * (counts - 1), 1)
    if parts is None:
        store_rows(entropy, expected_entropy, mutual_information, disagreement, b, row_valid,
                   entropies, tl.sum(expected, 1), tl.sum(mutual, 1), agreeing, members)
    else:
        step_of = tl.cast(chunks, tl.int64) * rows
        parts += tl.cast(chunk, tl.int64) * rows + b
        tl.store(parts, entropies, mask=row_valid)
        tl.store(parts + step_of, tl.sum(expected, 1), mask=row_valid)
        tl.store(parts + 2 * step_of, tl.sum(mutual, 1), mask=row_valid)
        tl.store(parts + 3 * step_of, agreeing, mask=row_valid)


@triton.jit
def scan_row(logits, classes, l_class, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """(largest logit, its first place, sum of exponentials above it) of one long row."""
    local = tl.arange(0, BLOCK_C)
    offsets = class_offsets(l_class, WIDE, BLOCK_C)
    top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_C,), tl.int32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, classes, BLOCK_C):
        valid = first + local < classes
        z = tl.load(logits + tl.cast(first, tl.int64) * l_class + offsets, mask=valid, other=float("-inf"))
        z = z.to(tl.float32)
        at = tl.where(z > top, first + local, at)
        higher = tl.maximum(top, z)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # all so far may be
        total = total * tl.exp(top - base) + tl.exp(z - base)
        top = higher
    largest = tl.max(top, 0)
    vote = tl.min(tl.where(top == largest, at, classes), 0)
    return largest, vote, tl.sum(total * tl.exp(top - largest), 0)


@triton.jit(do_not_specialize=["rows"])
def ensemble_predict_stats_kernel(
    logits, largest, sums, votes,
    rows, classes,
    l_member, l_row, l_class,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    logits += at // rows * l_member + at % rows * l_row
    top, vote, total = scan_row(logits, classes, l_class, WIDE, BLOCK_C)
    tl.store(largest + at, top)
    tl.store(sums + at, total)
    tl.store(votes + at, vote)


@triton.jit(do_not_specialize=["members", "rows", "chunks"])
def ensemble_predict_add_kernel(
    parts, entropy, expected_entropy, mutual_information, disagreement,
    members, rows, chunks,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = b < rows
    entropies = tl.zeros((BLOCK,), tl.float32)
    expected = tl.zeros((BLOCK,), tl.float32)
    mutual = tl.zeros((BLOCK,), tl.float32)
    agreeing = tl.zeros((BLOCK,), tl.float32)
    parts += b
    step_of = tl.cast(chunks, tl.int64) * rows
    for _ in range(0, chunks):
        entropies += tl.load(parts, mask=valid, other=0.0)
        expected += tl.load(parts + step_of, mask=valid, other=0.0)
        mutual += tl.load(parts + 2 * step_of, mask=valid, other=0.0)
        agreeing += tl.load(parts + 3 * step_of, mask=valid, other=0.0)
        parts += rows
    store_rows(entropy, expected_entropy, mutual_information, disagreement, b, valid,
               entropies, expected, mutual, agreeing, members)


# ------------------------------------------------------------------------------------------------ device: backward


@triton.jit
def load_or_zero(pointer, offsets, valid):
    if pointer is None:
        return tl.zeros(offsets.shape, tl.float32)
    else:
        return tl.load(pointer + offsets, mask=valid, other=0.0)


@triton.jit
def slope(p, log_p, mean, grad_mean, grad_variance, grad_entropy, grad_expected, grad_mutual):
    """v_e, times E, of a tile: dlogits_e = p_e (v_e - <p_e, v_e>).  Without constants, which that cancels."""
    v = grad_mean - (grad_entropy + grad_mutual)[:, None] * log_or_zero(mean)
    v += 2 * grad_variance * (p - mean)
    return v + (grad_mutual - grad_expected)[:, None] * tl.where(p == 0, 0.0, log_p)


@triton.jit(do_not_specialize=["members", "rows", "span"])
def ensemble_predict_bwd_kernel(
    logits, mean_probs, grad_mean, grad_variance, grad_entropy, grad_expected, grad_mutual, dlogits,
    members, rows, classes, span,
    l_member, l_row, l_class,
    WIDE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dlogits of some rows of `span` members."""
    spans = tl.cdiv(members, span)
    first = tl.program_id(0) % spans * span
    block = tl.program_id(0) // spans
    b, row_valid, down = row_offsets(block, rows, l_row, WIDE, BLOCK_B)
    c = tl.arange(0, BLOCK_C)
    class_valid = (c < classes)[None, :]
    offsets = down[:, None] + class_offsets(l_class, WIDE, BLOCK_C)[None, :]
    logits += tl.cast(block * BLOCK_B, tl.int64) * l_row + tl.cast(first, tl.int64) * l_member

    valid = row_valid[:, None] & class_valid
    results = (b.to(tl.int64) * classes)[:, None] + c[None, :]
    mean = tl.load(mean_probs + results, mask=valid, other=0.0)
    of_mean = load_or_zero(grad_mean, results, valid)
    of_variance = load_or_zero(grad_variance, results, valid)
    of_entropy = load_or_zero(grad_entropy, b, row_valid)
    of_expected = load_or_zero(grad_expected, b, row_valid)
    of_mutual = load_or_zero(grad_mutual, b, row_valid)
    step_of = tl.cast(rows, tl.int64) * classes
    dlogits += tl.cast(first, tl.int64) * step_of
    for _ in range(first, tl.minimum(first + span, members)):
        z = tl.load(logits + offsets, mask=class_valid, other=float("-inf")).to(tl.float32)
        logits += l_member
        z = z - tl.max(z, 1)[:, None]
        q = tl.exp(z)
        total = tl.sum(q, 1)
        p = q * (1 / total)[:, None]
        v = slope(p, z - tl.log(total)[:, None], mean, of_mean, of_variance, of_entropy, of_expected, of_mutual)
        v = p * (v - tl.sum(p * v, 1)[:, None]) / members.to(tl.float32)
        tl.store(dlogits + results, narrow(v, dlogits.dtype.element_ty), mask=valid)
        dlogits += step_of


@triton.jit
def chunk_of_row(
    logits, mean_probs, grad_mean, grad_variance, of_entropy, of_expected, of_mutual, top, total,
    first, row, classes, l_class,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """(places, which of them are there, p, v) of some classes of a long row, as [1, BLOCK_C]."""
    c = first + tl.arange(0, BLOCK_C)[None, :]
    valid = c < classes
    offsets = tl.cast(first, tl.int64) * l_class + class_offsets(l_class, WIDE, BLOCK_C)[None, :]
    z = tl.load(logits + offsets, mask=valid, other=float("-inf")).to(tl.float32) - top
    p = tl.exp(z) * (1 / total)
    at = row * classes + c
    mean = tl.load(mean_probs + at, mask=valid, other=0.0)
    of_mean = load_or_zero(grad_mean, at, valid)
    of_variance = load_or_zero(grad_variance, at, valid)
    v = slope(p, z - tl.log(total), mean, of_mean, of_variance, of_entropy, of_expected, of_mutual)
    return c, valid, p, v


@triton.jit(do_not_specialize=["members", "rows"])
def ensemble_predict_bwd_long_kernel(
    logits, mean_probs, grad_mean, grad_variance, grad_entropy, grad_expected, grad_mutual, dlogits,
    members, rows, classes,
    l_member, l_row, l_class,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """dlogits of one row of one member, which is read three times, from L2 but for the first."""
    at = tl.program_id(0).to(tl.int64)
    row = at % rows
    logits += at // rows * l_member + row * l_row
    dlogits += at * classes
    top, _vote, total = scan_row(logits, classes, l_class, WIDE, BLOCK_C)
    one = tl.arange(0, 1)
    of_entropy = load_or_zero(grad_entropy, row + one, one == 0)
    of_expected = load_or_zero(grad_expected, row + one, one == 0)
    of_mutual = load_or_zero(grad_mutual, row + one, one == 0)
    dots = tl.zeros((1, BLOCK_C), tl.float32)
    for first in range(0, classes, BLOCK_C):
        _c, _valid, p, v = chunk_of_row(
            logits, mean_probs, grad_mean, grad_variance, of_entropy, of_expected, of_mutual, top, total,
            first, row, classes, l_class, WIDE, BLOCK_C)
        dots += p * v
    dot = tl.sum(dots, 1)[:, None]
    for first in range(0, classes, BLOCK_C):
        c, valid, p, v = chunk_of_row(
            logits, mean_probs, grad_mean, grad_variance, of_entropy, of_expected, of_mutual, top, total,
            first, row, classes, l_class, WIDE, BLOCK_C)
        tl.store(dlogits + c, narrow(p * (v - dot) / members.to(tl.float32), dlogits.dtype.element_ty), mask=valid)


# fmt: on
# ------------------------------------------------------------------------------------------------ host


class Rows(NamedTuple):
    """What one program has at a time."""

    BLOCK_B: int
    BLOCK_C: int
    num_warps: int
    num_stages: int = 1


class Chunk(NamedTuple):
    """The same of one row."""

    BLOCK_C: int
    num_warps: int = 8
    num_stages: int = 1


MOST_CLASSES = 2048  # of a tile: eight elements a thread


def fwd(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mean, variance [B, C]; entropy, expected entropy, mutual information, disagreement [B]), float32."""
    logits = logits.resolve_neg()
    members, rows, classes = logits.shape
    of_classes = [_floats(logits, rows, classes) for _ in range(2)]
    of_rows = [_floats(logits, rows) for _ in range(4)]
    if rows == 0:
        return *of_classes, *of_rows
    plans = _plan_fwd(members, rows, classes, logits.stride(), capability(logits.device))
    if len(plans) == 1:
        launch(plans[0], logits, None, None, None, *of_classes, *of_rows, None)
        return *of_classes, *of_rows
    scan, main, add = plans
    largest, sums = _floats(logits, members, rows), _floats(logits, members, rows)
    votes = logits.new_empty(members, rows, dtype=torch.int32)
    parts = _floats(logits, 4, triton.cdiv(classes, MOST_CLASSES), rows)
    launch(scan, logits, largest, sums, votes)
    launch(main, logits, largest, sums, votes, *of_classes, None, None, None, None, parts)
    launch(add, parts, *of_rows)
    return *of_classes, *of_rows


def bwd(
    logits: Tensor,
    mean_probs: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_entropy: Tensor,
    grad_expected: Tensor,
    grad_mutual: Tensor,
) -> Tensor:
    """dlogits [E, B, C], contiguous; gradients that are not given are empty."""
    logits = logits.resolve_neg()
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel() == 0:
        return dlogits
    grads = (g if g.numel() else None for g in (grad_mean, grad_variance, grad_entropy, grad_expected, grad_mutual))
    plan = _plan_bwd(*logits.shape, logits.stride(), capability(logits.device))
    launch(plan, logits, mean_probs, *grads, dlogits)
    return dlogits


def _floats(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)


@lru_cache(maxsize=4096)
def _plan_fwd(members: int, rows: int, classes: int, strides: tuple[int, int, int], capability: int) -> list[Plan]:
    """Of one launch; of three, where rows are long."""
    tile = _tile(rows, classes, capability)
    chunks, wide = triton.cdiv(classes, tile.BLOCK_C), _is_wide(tile, strides)
    programs = triton.cdiv(rows, tile.BLOCK_B) * chunks
    scalars = members, rows, classes, chunks, *strides
    main = Plan.of(ensemble_predict_fwd_kernel, programs, scalars, tile, WIDE=wide)
    if chunks == 1:
        return [main]
    sizes, block = (rows, classes, *strides), Block()
    scan = Plan.of(ensemble_predict_stats_kernel, members * rows, sizes, Chunk(MOST_CLASSES), WIDE=wide)
    add = Plan.of(ensemble_predict_add_kernel, triton.cdiv(rows, block.BLOCK), (members, rows, chunks), block)
    return [scan, main, add]


@lru_cache(maxsize=4096)
def _plan_bwd(members: int, rows: int, classes: int, strides: tuple[int, int, int], capability: int) -> Plan:
    tile = _tile(rows, classes, capability)
    wide = _is_wide(tile, strides)
    if classes > tile.BLOCK_C:
        scalars, chunk = (members, rows, classes, *strides), Chunk(MOST_CLASSES)
        return Plan.of(ensemble_predict_bwd_long_kernel, members * rows, scalars, chunk, WIDE=wide)
    blocks = triton.cdiv(rows, tile.BLOCK_B)
    # As many members of a program as leave programs for all of the GPU: they share the mean and its gradients.
    span = triton.cdiv(members, min(members, max(1, 4 * fill(capability) // blocks)))
    programs = blocks * triton.cdiv(members, span)
    return Plan.of(ensemble_predict_bwd_kernel, programs, (members, rows, classes, span, *strides), tile, WIDE=wide)


def _tile(rows: int, classes: int, capability: int) -> Rows:
    """All classes, if there is room, of as many rows as leave programs for all of the GPU; eight elements a thread."""
    block = min(MOST_CLASSES, triton.next_power_of_2(classes))
    elements = max(block, 1024)
    while elements > max(block, 256) and rows * block < 4 * fill(capability) * elements:
        elements //= 2
    return Rows(elements // block, block, elements // 256)


def _is_wide(tile: Rows, strides: tuple[int, int, int]) -> bool:
    """Whether 32-bit offsets could overflow within a tile."""
    return tile.BLOCK_B * strides[1] + tile.BLOCK_C * strides[2] >= 1 << 31
