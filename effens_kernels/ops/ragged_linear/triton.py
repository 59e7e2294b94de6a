"""ragged_linear in Triton: one launch forward, one for dx, one for dW with db.

The host does not know where members begin.  Forward and for dx it launches as many row tiles as any offsets can need,
and each finds its member and its rows; for dW each program reads the bounds of its member.  Offsets are clamped to
0 .. N, and rows of no member give zeros.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_engine import (
    Layout,
    Plan,
    activate,
    capability,
    choose_tile,
    contract,
    launch,
    lines,
    load_gradient,
    load_line,
    load_tile,
    operand,
    precision,
    program_tile,
    row_sums,
    store_line,
    store_tile,
)
from ..triton_segments import member_rows, row_tiles, rows_of_tile

# Kernels keep the grouping of their arguments: tensors, sizes, (member, row, feature) strides, choices.
# fmt: off


@triton.jit(do_not_specialize=["members", "rows"])
def ragged_linear_fwd_kernel(
    x, weight, offsets, bias, y, z,
    members, rows, outputs, inputs,
    x_row, x_in, w_member, w_out, w_in, b_member, b_out,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = act(x W^T + b) as [rows, outputs] = [rows, inputs] x [outputs, inputs]^T; z receives the pre-activation."""
    height = row_tiles(rows, members, BLOCK_M) * BLOCK_M
    _, tile, n = program_tile(height, tl.cdiv(outputs, BLOCK_N), BLOCK_M)
    member, first, count = rows_of_tile(offsets, tile, rows, members, BLOCK_M)
    inside = (member >= 0) & (member < members) & (count > 0)

    x_rows = lines(x + first * x_row, 0, count, x_row, 1, 0, False, WIDE, BLOCK_M)
    x_rows = operand(x_rows, x_in, 0, False, WIDE, BLOCK_K)
    w_rows = lines(weight + member * w_member, n, outputs, w_out, 1, 0, False, WIDE, BLOCK_N)
    w_rows = operand(w_rows, w_in, 0, False, WIDE, BLOCK_K)
    size = tl.where(inside, inputs, 0)
    acc = contract(load_tile, x_rows, None, load_tile, w_rows, None, size, 1,
                   False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

    if bias is not None:
        size = tl.where(inside, outputs, 0)
        acc += load_line(bias + member * b_member, n, size, b_out, WIDE, BLOCK_N)[None, :]
    if z is not None:
        store_tile(z + first * outputs, acc, 0, count, outputs, n, outputs, 1, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)
    store_tile(y + first * outputs, activate(acc, ACTIVATION), 0, count, outputs, n, outputs, 1, 1, 0,
               False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["members", "rows"])
def ragged_linear_dgrad_kernel(
    grad, saved, weight, offsets, dx,
    members, rows, outputs, inputs,
    g_row, g_out, s_row, s_out, w_member, w_out, w_in, dx_row, dx_in,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx = g W as [rows, inputs] = [rows, outputs] x [inputs, outputs]^T, g = grad * act'."""
    height = row_tiles(rows, members, BLOCK_M) * BLOCK_M
    _, tile, n = program_tile(height, tl.cdiv(inputs, BLOCK_N), BLOCK_M)
    member, first, count = rows_of_tile(offsets, tile, rows, members, BLOCK_M)
    inside = (member >= 0) & (member < members) & (count > 0)

    g = lines(grad + first * g_row, 0, count, g_row, 1, 0, False, WIDE, BLOCK_M)
    g = operand(g, g_out, 0, False, WIDE, BLOCK_K)
    s = g
    if ACTIVATION is not None:
        s = lines(saved + first * s_row, 0, count, s_row, 1, 0, False, WIDE, BLOCK_M)
        s = operand(s, s_out, 0, False, WIDE, BLOCK_K)
    w = lines(weight + member * w_member, n, inputs, w_in, 1, 0, False, WIDE, BLOCK_N)
    w = operand(w, w_out, 0, False, WIDE, BLOCK_K)
    size = tl.where(inside, outputs, 0)
    acc = contract(load_gradient, (g, s), ACTIVATION, load_tile, w, None, size, 1,
                   False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    store_tile(dx + first * dx_row, acc, 0, count, dx_row, n, inputs, dx_in, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def ragged_linear_wgrad_kernel(
    grad, saved, x, offsets, dw, db,
    rows, outputs, inputs,
    g_row, g_out, s_row, s_out, x_row, x_in,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dW = g^T x over a member's rows, as [outputs, inputs] = [outputs, rows] x [inputs, rows]^T; db = row sums of
    g^T, by the programs of one further column tile.  Either of dw and db may be None."""
    column_tiles = 0
    if dw is not None:
        column_tiles = tl.cdiv(inputs, BLOCK_N)
    all_tiles = column_tiles
    if db is not None:
        all_tiles = column_tiles + 1
    member, m, n = program_tile(outputs, all_tiles, BLOCK_M)
    first, count = member_rows(offsets, member, rows)

    g = lines(grad + first * g_row, m, outputs, g_out, 1, 0, False, WIDE, BLOCK_M)
    g = operand(g, g_row, 0, False, WIDE, BLOCK_K)
    s = g
    if ACTIVATION is not None:
        s = lines(saved + first * s_row, m, outputs, s_out, 1, 0, False, WIDE, BLOCK_M)
        s = operand(s, s_row, 0, False, WIDE, BLOCK_K)
    if dw is not None:
        if n < column_tiles:
            x_columns = lines(x + first * x_row, n, inputs, x_in, 1, 0, False, WIDE, BLOCK_N)
            x_columns = operand(x_columns, x_row, 0, False, WIDE, BLOCK_K)
            acc = contract(load_gradient, (g, s), ACTIVATION, load_tile, x_columns, None, count, 1,
                           False, WIDE, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            store_tile(dw + member * outputs * inputs, acc, m, outputs, inputs, n, inputs, 1, 1, 0,
                       False, WIDE, BLOCK_M, BLOCK_N)
    if db is not None:
        if n == column_tiles:
            sums = row_sums(load_gradient, (g, s), ACTIVATION, count, 1, False, WIDE, False, BLOCK_M, BLOCK_K)
            store_line(db + member * outputs, sums, m, outputs, BLOCK_M)


# fmt: on


def fwd(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, activation: str | None, save_preactivation: bool
) -> tuple[Tensor, Tensor]:
    """(y, z): act(z) contiguous [N, O], and z likewise, or empty where it need not be saved."""
    x, weight, bias = x.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg()
    y = x.new_empty((x.shape[0], weight.shape[1]))
    z = x.new_empty(y.shape if save_preactivation else 0)
    if y.numel():
        strides = x.stride(), weight.stride(), (0, 0) if bias is None else bias.stride()
        plan = _plan_fwd(x.shape, weight.shape, strides, activation, *_where(x))
        launch(plan, x, weight, offsets.contiguous(), bias, y, z if save_preactivation else None)
    return y, z


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    saved: Tensor,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x, dW [E, O, I], db [E, O]), an empty tensor in place of each that is not needed."""
    grad, x, weight, saved = (t.resolve_neg() for t in (grad, x, weight, saved))  # kernels read memory, not sign bits
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    dw = x.new_empty(weight.shape if need_weight else 0)
    db = x.new_empty(weight.shape[:2] if need_bias else 0)
    offsets = offsets.contiguous()
    saved, s_strides = (None, (0, 0)) if activation is None else (saved, saved.stride())
    where = _where(x)
    if dx.numel():
        strides = grad.stride(), s_strides, weight.stride(), dx.stride()
        plan = _plan_dgrad(x.shape, weight.shape, strides, activation, *where)
        launch(plan, grad, saved, weight, offsets, dx)
    if dw.numel() or db.numel():
        need = dw.numel() > 0, db.numel() > 0
        strides = grad.stride(), s_strides, x.stride()
        plan = _plan_wgrad(x.shape, weight.shape, strides, activation, *need, *where)
        launch(plan, grad, saved, x, offsets, dw if need[0] else None, db if need[1] else None)
    return dx, dw, db


# ------------------------------------------------------------------------------------------------ plans


def _where(x: Tensor) -> tuple[torch.dtype, str, int]:
    return x.dtype, precision(x.dtype), capability(x.device)


@lru_cache(maxsize=4096)
def _plan_fwd(x_shape, w_shape, strides, activation, dtype, how, capability) -> Plan:
    (rows, inputs), (members, outputs, _) = x_shape, w_shape
    x, weight, bias = strides
    layout = _layout(inputs, outputs, x, weight)
    each = _rows_each(rows, members)
    tile = choose_tile(members, each, outputs, dtype, how, capability, layout, activation=activation is not None)
    return Plan.of(
        ragged_linear_fwd_kernel,
        _row_tiles(rows, members, tile.BLOCK_M) * triton.cdiv(outputs, tile.BLOCK_N),
        (members, rows, outputs, inputs, *x, *weight, *bias),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=inputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_dgrad(x_shape, w_shape, strides, activation, dtype, how, capability) -> Plan:
    (rows, inputs), (members, outputs, _) = x_shape, w_shape
    grad, saved, weight, dx = strides
    layout = _layout(inputs, outputs, *strides)
    each = _rows_each(rows, members)
    tile = choose_tile(members, each, inputs, dtype, how, capability, layout, slope=activation is not None)
    return Plan.of(
        ragged_linear_dgrad_kernel,
        _row_tiles(rows, members, tile.BLOCK_M) * triton.cdiv(inputs, tile.BLOCK_N),
        (members, rows, outputs, inputs, *grad, *saved, *weight, *dx),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=outputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_wgrad(x_shape, w_shape, strides, activation, need_weight, need_bias, dtype, how, capability) -> Plan:
    (rows, inputs), (members, outputs, _) = x_shape, w_shape
    grad, saved, x = strides
    layout = _layout(inputs, outputs, *strides)
    tile = choose_tile(members, outputs, inputs, dtype, how, capability, layout, slope=activation is not None)
    _row_tiles(rows, members, tile.BLOCK_M)
    column_tiles = need_weight * triton.cdiv(inputs, tile.BLOCK_N) + need_bias
    return Plan.of(
        ragged_linear_wgrad_kernel,
        members * triton.cdiv(outputs, tile.BLOCK_M) * column_tiles,
        (rows, outputs, inputs, *grad, *saved, *x),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        PRECISION=how,
    )


def _layout(inputs: int, outputs: int, *strides: tuple[int, ...]) -> Layout:
    return Layout.of(inputs, outputs, *((0, *s) if len(s) == 2 else s for s in strides))


def _rows_each(rows: int, members: int) -> int:
    """Of a member, for the choice of a tile, where the host knows no better than that they are alike."""
    return triton.cdiv(rows, max(1, members))


def _row_tiles(rows: int, members: int, block: int) -> int:
    """As the kernels count them, in 32 bits."""
    count = triton.cdiv(rows, block) + members + 1
    if count * block >= 2**31:
        raise ValueError(f"ragged_linear: {rows} rows of {members} members are more than 32 bits can count")
    return count
