"""mix_templates in Triton: one launch forward; backward one for both gradients, one that adds up the parts of dC.

    theta = C A        dA = C^T g        dC = g A^T        C [M, T], A [T, N], g [M, N]

A column takes (T + M) s bytes and 2 M T FLOPs forward, (M + 2 T) s bytes and 4 M T FLOPs backward, with s bytes per
element.  Backward, a program goes through some of the columns and keeps its part of dC in registers; of each tile of g
and A, which are loaded once, it makes a tile of dA.  Parts are float32 and are added in a fixed order.  Where one tile
has not room for all rows, programs share columns, one after the other, so that templates come from L2; dA is then
a launch of its own, the forward's with C^T and g.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_engine import (
    Block,
    Plan,
    Tile,
    add_parts,
    capability,
    contract,
    fill,
    launch,
    lines,
    load_line,
    load_tile,
    operand,
    precision,
    store_tile,
)

# Kernels keep the grouping of their arguments: tensors, sizes, strides, choices.  BLOCK_K is of templates.
# fmt: off


@triton.jit(do_not_specialize=["rows"])
def mix_templates_fwd_kernel(
    coefficients, templates, mixed, sigma,
    rows, count, columns,
    c_row, c_template, t_row,
    WIDE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """mixed = coefficients templates, as [rows, columns] = [rows, count] x [count, columns]; plus sigma mixed, where
    columns have a sigma."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % row_tiles
    n = tl.program_id(0) // row_tiles
    if WIDE:
        n = n.to(tl.int64)
    a = operand(lines(coefficients, m, rows, c_row, 1, 0, False, WIDE, BLOCK_M), c_template, 0, False, WIDE, BLOCK_K)
    b = operand(lines(templates, n, columns, 1, 1, 0, False, WIDE, BLOCK_N), t_row, 0, False, WIDE, BLOCK_K)
    acc = contract(load_tile, a, None, load_tile, b, None, count, 1,
                   False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if sigma is not None:
        noise = operand(lines(mixed, m, rows, columns, 1, 0, False, WIDE, BLOCK_M), 1, 0, False, WIDE, BLOCK_N)
        noise = load_tile(noise, n * BLOCK_N, columns, 1, None, False, WIDE, False, BLOCK_N)
        acc += load_line(sigma, n, columns, 1, WIDE, BLOCK_N)[None, :] * noise.to(tl.float32)
    store_tile(mixed, acc, m, rows, columns, n, columns, 1, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows", "span"])
def mix_templates_bwd_kernel(
    grad, coefficients, templates, dtemplates, parts,
    rows, count, columns, span,
    g_row, c_row, c_template, t_row,
    WIDE: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dtemplates = coefficients^T grad, if wanted, which takes one tile of rows; parts of grad templates^T, of `span`
    columns each."""
    template_tiles = tl.cdiv(count, BLOCK_K)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    t = tl.program_id(0) % template_tiles
    m = tl.program_id(0) // template_tiles % row_tiles
    part = (tl.program_id(0) // (template_tiles * row_tiles)).to(tl.int64)

    g = operand(lines(grad, m, rows, g_row, 1, 0, False, WIDE, BLOCK_M), 1, 0, False, WIDE, BLOCK_N)
    a = operand(lines(templates, t, count, t_row, 1, 0, False, WIDE, BLOCK_K), 1, 0, False, WIDE, BLOCK_N)
    if dtemplates is not None:
        by = lines(coefficients, t, count, c_template, 1, 0, False, WIDE, BLOCK_K)
        by = load_tile(operand(by, c_row, 0, False, WIDE, BLOCK_M), 0, rows, 1, None, False, WIDE, False, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = part * span
    last = tl.minimum(first + span, columns)
    if not WIDE:
        first = first.to(tl.int32)
        last = last.to(tl.int32)
    for n in range(first, last, BLOCK_N):
        g_tile = load_tile(g, n, columns, 1, None, False, WIDE, EVEN_N, BLOCK_N)
        a_tile = load_tile(a, n, columns, 1, None, False, WIDE, EVEN_N, BLOCK_N)
        acc = tl.dot(g_tile, tl.trans(a_tile), acc, input_precision=PRECISION)
        if dtemplates is not None:
            mixed = tl.dot(by, g_tile, input_precision=PRECISION)
            store_tile(dtemplates, mixed, t, count, columns, n // BLOCK_N, columns, 1, 1, 0,
                       False, WIDE, BLOCK_K, BLOCK_N)
    store_tile(parts + part * rows * count, acc, m, rows, count, t, count, 1, 1, 0, False, False, BLOCK_M, BLOCK_K)


@triton.jit(do_not_specialize=["size", "count"])
def mix_templates_add_kernel(parts, result, size, count, BLOCK: tl.constexpr):
    """The sums are few and the parts many: more of these at a time than elsewhere."""
    add_parts(parts, result, tl.program_id(0), size, count, BLOCK, 64)


# fmt: on


def fwd(coefficients: Tensor, templates: Tensor) -> Tensor:
    """[M, N], contiguous."""
    coefficients, templates = coefficients.resolve_neg(), _rows(templates)
    mixed = templates.new_empty((coefficients.shape[0], templates.shape[1]))
    if mixed.numel():
        _mix(coefficients, templates, mixed, precision(mixed.dtype))
    return mixed


def mix_with_noise_(noise: Tensor, sigma: Tensor, coefficients: Tensor, templates: Tensor) -> None:
    if noise.numel():
        sigma = sigma.resolve_neg().contiguous()
        _mix(coefficients.resolve_neg(), _rows(templates), noise, "ieee", sigma)


def bwd(
    grad: Tensor, coefficients: Tensor, templates: Tensor, need_coefficients: bool, need_templates: bool
) -> tuple[Tensor, Tensor]:
    """(dC [M, T], dA [T, N]), an empty tensor in place of each that is not needed."""
    dcoefficients = coefficients.new_empty(coefficients.shape if need_coefficients else 0)
    dtemplates = templates.new_empty(templates.shape if need_templates else 0)
    if grad.numel() == 0:
        return dcoefficients.zero_(), dtemplates.zero_()
    coefficients, grad, templates = coefficients.resolve_neg(), _rows(grad), _rows(templates)
    strides = grad.stride(0), *coefficients.stride(), templates.stride(0)
    sums = _plan_bwd(*coefficients.shape, grad.shape[1], strides, *_where(grad))
    together = need_coefficients and need_templates and sums.row_tiles == 1
    if need_templates and not together:
        _mix(coefficients.mT, grad, dtemplates, precision(grad.dtype))
    if need_coefficients:
        parts = grad.new_empty((sums.parts, dcoefficients.numel()), dtype=torch.float32)
        launch(sums.plan, grad, coefficients, templates, dtemplates if together else None, parts)
        launch(sums.add, parts, dcoefficients)
    return dcoefficients, dtemplates


def _mix(coefficients: Tensor, templates: Tensor, mixed: Tensor, how: str, sigma: Tensor | None = None) -> None:
    strides = *coefficients.stride(), templates.stride(0)
    where = templates.dtype, how, capability(templates.device)
    plan = _plan_fwd(*coefficients.shape, templates.shape[1], strides, *where)
    launch(plan, coefficients, templates, mixed, sigma)


def _rows(t: Tensor) -> Tensor:
    """`t` with neighboring elements in each row; kernels read memory, not sign bits."""
    t = t.resolve_neg()
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


# ------------------------------------------------------------------------------------------------ plans


def _where(t: Tensor) -> tuple[torch.dtype, str, int]:
    return t.dtype, precision(t.dtype), capability(t.device)


@lru_cache(maxsize=4096)
def _plan_fwd(rows: int, count: int, columns: int, strides: tuple[int, int, int], dtype, how, capability) -> Plan:
    block, plain = _block(rows), _is_plain(dtype, how)
    tile = Tile(block, min(256, (2048 if plain else 4096) // block), _block(count, 16 if plain else 64), 4, 2)
    return Plan.of(
        mix_templates_fwd_kernel,
        triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N),
        (rows, count, columns, *strides),
        tile,
        WIDE=_is_wide(columns, *strides),
        EVEN_K=count % tile.BLOCK_K == 0,
        PRECISION=how,
    )


class Sums(NamedTuple):
    """The launch that makes parts of dC, how many, and the launch that adds them up."""

    plan: Plan
    parts: int
    add: Plan
    row_tiles: int


@lru_cache(maxsize=4096)
def _plan_bwd(rows: int, count: int, columns: int, strides: tuple[int, ...], dtype, how, capability) -> Sums:
    if _is_plain(dtype, how):
        tile = Tile(_block(rows, 32), 32, _block(count, 32), 4, 4)
    else:
        m, k = _block(rows), _block(count)
        bytes = 16 << 10 if (columns | strides[0] | strides[3]) & 15 == 0 else 8 << 10  # of a step
        widest = bytes // (dtype.itemsize * (m + k))
        tile = Tile(m, 1 << (widest.bit_length() - 1), k, 4, 2)
    row_tiles, template_tiles = triton.cdiv(rows, tile.BLOCK_M), triton.cdiv(count, tile.BLOCK_K)
    steps = triton.cdiv(columns, tile.BLOCK_N)
    # As few parts as keep the GPU busy, four programs on each multiprocessor.
    span = tile.BLOCK_N * triton.cdiv(steps, max(1, 4 * fill(capability) // (row_tiles * template_tiles)))
    parts, block = triton.cdiv(columns, span), Block(32)
    plan = Plan.of(
        mix_templates_bwd_kernel,
        parts * row_tiles * template_tiles,
        (rows, count, columns, span, *strides),
        tile,
        WIDE=_is_wide(columns, *strides),
        EVEN_N=columns % tile.BLOCK_N == 0,
        PRECISION=how,
    )
    add = Plan.of(mix_templates_add_kernel, triton.cdiv(rows * count, block.BLOCK), (rows * count, parts), block)
    return Sums(plan, parts, add, row_tiles)


def _block(size: int, most: int = 64) -> int:
    """Of rows or templates: tl.dot takes no less than 16."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _is_plain(dtype: torch.dtype, how: str) -> bool:
    """Without tensor cores: all of a tile's reduction, over templates, rows or columns, passes through registers."""
    return dtype == torch.float32 and how == "ieee"


def _is_wide(columns: int, *strides: int) -> bool:
    """Whether 32-bit offsets could overflow within a tile of 64 rows."""
    return max(columns, *strides) >= 1 << 24
