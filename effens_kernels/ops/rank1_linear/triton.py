"""rank1_linear in Triton: one launch forward; one for dx, one for dW, dr, ds and db, one that adds up their parts.

    y_e = act(((x_e * r_e) W^T) * s_e + b_e)

The scales are applied where operands are loaded and results stored.  Where a member has few rows, the rows of all
members make one product (FOLD), since they share W.  Backward, each tile of [outputs, inputs] goes member by member
through G_e = g_e^T x_e, which all three gradients are sums of:

    dW = sum_e s_e G_e r_e        dr_e[i] = sum_o s_e W G_e        ds_e[o] = sum_i r_e W G_e

so that G_e is never stored.  dr and ds are summed over tiles, dW over groups of members where tiles alone would not
fill the GPU; such parts are float32 and are added in a fixed order.
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
    Layout,
    Plan,
    Tile,
    activate,
    add_parts,
    capability,
    choose_tile,
    contract,
    fill,
    launch,
    lines,
    load_columns,
    load_gradient,
    load_line,
    load_scaled,
    load_scaled_gradient,
    load_tile,
    member_lines,
    multiply,
    of_member,
    operand,
    precision,
    program_tile,
    row_sums,
    store_line,
    store_tile,
)

# Kernels keep the grouping of their arguments: tensors, sizes, (member, row, feature) strides, choices.
# fmt: off


@triton.jit(do_not_specialize=["members", "rows"])
def rank1_linear_fwd_kernel(
    x, weight, r, s, bias, y, z,
    members, rows, outputs, inputs,
    x_member, x_row, x_in, w_out, w_in, r_member, r_in, s_member, s_out, b_member, b_out,
    FOLD: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = act((x r) W^T s + b) as [rows, outputs] = [rows, inputs] x [outputs, inputs]^T; z: the pre-activation."""
    height = rows
    if FOLD:
        height = rows * members
    member, m, n = program_tile(height, tl.cdiv(outputs, BLOCK_N), BLOCK_M)  # with FOLD, member is 0
    y_member = tl.cast(rows, tl.int64) * outputs

    x_rows = lines(x + member * x_member, m, height, x_row, rows, x_member, FOLD, WIDE, BLOCK_M)
    x_rows = operand(x_rows, x_in, 0, False, WIDE, BLOCK_K)
    by = member_lines(r, member, m, height, rows, r_member, FOLD, WIDE, BLOCK_M)
    by = operand(by, r_in, 0, False, WIDE, BLOCK_K)
    w_rows = lines(weight, n, outputs, w_out, 1, 0, False, WIDE, BLOCK_N)
    w_rows = operand(w_rows, w_in, 0, False, WIDE, BLOCK_K)
    acc = contract(load_scaled, (x_rows, by), None, load_tile, w_rows, None, inputs, 1,
                   False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

    by = member_lines(s, member, m, height, rows, s_member, FOLD, WIDE, BLOCK_M)
    acc *= load_columns(by, n, outputs, s_out, WIDE, BLOCK_N)
    if bias is not None:
        by = member_lines(bias, member, m, height, rows, b_member, FOLD, WIDE, BLOCK_M)
        acc += load_columns(by, n, outputs, b_out, WIDE, BLOCK_N)
    if z is not None:
        store_tile(z + member * y_member, acc, m, height, outputs, n, outputs, 1, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)
    store_tile(y + member * y_member, activate(acc, ACTIVATION), m, height, outputs, n, outputs, 1, 1, 0,
               False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["members", "rows"])
def rank1_linear_dgrad_kernel(
    grad, saved, weight, r, s, dx,
    members, rows, outputs, inputs,
    g_member, g_row, g_out, saved_member, saved_row, saved_out, w_out, w_in, r_member, r_in, s_member, s_out,
    dx_member, dx_row, dx_in,
    SHARED: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx = (g s) W r as [rows, inputs] = [rows, outputs] x [inputs, outputs]^T, g = grad * act'; SHARED sums over
    members, each product scaled before it is added."""
    height = rows
    if FOLD:
        height = rows * members
    member, m, n = program_tile(height, tl.cdiv(inputs, BLOCK_N), BLOCK_M)  # with FOLD or SHARED, member is 0

    g = lines(grad + member * g_member, m, height, g_row, rows, g_member, FOLD, WIDE, BLOCK_M)
    g = operand(g, g_out, 0, False, WIDE, BLOCK_K)
    z = g
    if ACTIVATION is not None:
        z = lines(saved + member * saved_member, m, height, saved_row, rows, saved_member, FOLD, WIDE, BLOCK_M)
        z = operand(z, saved_out, 0, False, WIDE, BLOCK_K)
    by = member_lines(s, member, m, height, rows, s_member, FOLD, WIDE, BLOCK_M)
    by = operand(by, s_out, 0, False, WIDE, BLOCK_K)
    w = operand(lines(weight, n, inputs, w_in, 1, 0, False, WIDE, BLOCK_N), w_out, 0, False, WIDE, BLOCK_K)

    if SHARED:
        # One loop over members and outputs, so that the next member's loads are on their way at a member's end.
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        steps = tl.cdiv(outputs, BLOCK_K)
        for step in range(0, members * steps):
            e = step // steps
            k = step % steps * BLOCK_K
            operands = of_member(g, e, g_member), of_member(z, e, saved_member), of_member(by, e, s_member)
            acc = multiply(load_scaled_gradient, operands, ACTIVATION, load_tile, w, None, acc, k, outputs, 1,
                           False, WIDE, EVEN_K, PRECISION, BLOCK_K)
            if step % steps == steps - 1:
                scale = member_lines(r, tl.cast(e, tl.int64), m, rows, 1, r_member, False, WIDE, BLOCK_M)
                total += acc * load_columns(scale, n, inputs, r_in, WIDE, BLOCK_N)
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        total = contract(load_scaled_gradient, (g, z, by), ACTIVATION, load_tile, w, None, outputs, 1,
                         False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        by = member_lines(r, member, m, height, rows, r_member, FOLD, WIDE, BLOCK_M)
        total *= load_columns(by, n, inputs, r_in, WIDE, BLOCK_N)
    store_tile(dx + member * dx_member, total, m, height, dx_row, n, inputs, dx_in, 1, 0,
               False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["members", "rows", "span"])
def rank1_linear_wgrad_kernel(
    grad, saved, x, weight, r, s, dw, dr, ds, db,
    members, rows, outputs, inputs, span,
    g_member, g_row, g_out, saved_member, saved_row, saved_out, x_member, x_row, x_in, w_out, w_in,
    r_member, r_in, s_member, s_out,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Parts of dW [groups, outputs, inputs], dr [row tiles, members, inputs] and ds [column tiles, members, outputs]
    from G = g^T x of each of a group's `span` members; db by the programs of one further column tile.  Any of the
    four may be None."""
    # W stays in registers; plain multiply-adds, which keep their operands there, leave no room for it.
    HOLD: tl.constexpr = PRECISION != "ieee" or weight.dtype.element_ty != tl.float32
    column_tiles = 0
    if dw is not None or dr is not None or ds is not None:
        column_tiles = tl.cdiv(inputs, BLOCK_N)
    all_tiles = column_tiles
    if db is not None:
        all_tiles = column_tiles + 1
    group, m, n = program_tile(outputs, all_tiles, BLOCK_M)
    first = group.to(tl.int32) * span
    last = tl.minimum(first + span, members)

    g = operand(lines(grad, m, outputs, g_out, 1, 0, False, WIDE, BLOCK_M), g_row, 0, False, WIDE, BLOCK_K)
    z = g
    if ACTIVATION is not None:
        z = operand(lines(saved, m, outputs, saved_out, 1, 0, False, WIDE, BLOCK_M), saved_row, 0, False, WIDE, BLOCK_K)

    if dw is not None or dr is not None or ds is not None:
        if n < column_tiles:
            columns = operand(lines(x, n, inputs, x_in, 1, 0, False, WIDE, BLOCK_N), x_row, 0, False, WIDE, BLOCK_K)
            weights = lines(weight, m, outputs, w_out, 1, 0, False, WIDE, BLOCK_M)
            weights = operand(weights, w_in, 0, False, WIDE, BLOCK_N)
            if HOLD:
                w = load_tile(weights, n * BLOCK_N, inputs, 1, None, False, WIDE, False, BLOCK_N)
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            steps = tl.cdiv(rows, BLOCK_K)
            for step in range(first * steps, last * steps):
                e = step // steps
                k = step % steps * BLOCK_K
                operands = of_member(g, e, g_member), of_member(z, e, saved_member)
                acc = multiply(load_gradient, operands, ACTIVATION, load_tile, of_member(columns, e, x_member), None,
                               acc, k, rows, 1, False, WIDE, EVEN_K, PRECISION, BLOCK_K)
                if step % steps == steps - 1:
                    at = tl.cast(e, tl.int64)
                    by_row = load_line(s + at * s_member, m, outputs, s_out, WIDE, BLOCK_M)
                    by_column = load_line(r + at * r_member, n, inputs, r_in, WIDE, BLOCK_N)
                    if dr is not None or ds is not None:
                        if not HOLD:
                            w = load_tile(weights, n * BLOCK_N, inputs, 1, None, False, WIDE, False, BLOCK_N)
                        wg = w.to(tl.float32) * acc
                        if dr is not None:
                            part_of_dr = dr + (tl.cast(m, tl.int64) * members + at) * inputs
                            store_line(part_of_dr, tl.sum(wg * by_row[:, None], 0), n, inputs, BLOCK_N)
                        if ds is not None:
                            part_of_ds = ds + (tl.cast(n, tl.int64) * members + at) * outputs
                            store_line(part_of_ds, tl.sum(wg * by_column[None, :], 1), m, outputs, BLOCK_M)
                    if dw is not None:
                        total += acc * by_row[:, None] * by_column[None, :]
                    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if dw is not None:
                store_tile(dw + group * outputs * inputs, total, m, outputs, inputs, n, inputs, 1, 1, 0,
                           False, WIDE, BLOCK_M, BLOCK_N)
    if db is not None:
        if n == column_tiles:
            for e in range(first, last):
                operands = of_member(g, e, g_member), of_member(z, e, saved_member)
                sums = row_sums(load_gradient, operands, ACTIVATION, rows, 1, False, WIDE, EVEN_K, BLOCK_M, BLOCK_K)
                store_line(db + tl.cast(e, tl.int64) * outputs, sums, m, outputs, BLOCK_M)


@triton.jit(do_not_specialize=["dw_count", "dr_count", "ds_count"])
def rank1_linear_add_kernel(
    dw_parts, dr_parts, ds_parts, dw, dr, ds,
    dw_size, dr_size, ds_size, dw_count, dr_count, ds_count,
    BLOCK: tl.constexpr,
):
    """Each result from its parts, where there are any, by programs of its own."""
    block = tl.program_id(0)
    if dw_parts is not None:
        blocks = tl.cdiv(dw_size, BLOCK)
        if block < blocks:
            add_parts(dw_parts, dw, block, dw_size, dw_count, BLOCK)
        block -= blocks
    if dr_parts is not None:
        blocks = tl.cdiv(dr_size, BLOCK)
        if (block >= 0) & (block < blocks):
            add_parts(dr_parts, dr, block, dr_size, dr_count, BLOCK)
        block -= blocks
    if ds_parts is not None:
        if block >= 0:
            add_parts(ds_parts, ds, block, ds_size, ds_count, BLOCK)


# fmt: on


def fwd(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None,
    activation: str | None,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z): act(z) contiguous [E, B, O], and z likewise, or empty where it need not be saved."""
    x, weight, r, s = (t.resolve_neg() for t in (x, weight, r, s))  # kernels read memory, not sign bits
    bias = None if bias is None else bias.resolve_neg()
    y = x.new_empty((r.shape[0], x.shape[-2], weight.shape[0]))
    z = x.new_empty(y.shape if save_preactivation else 0)
    if y.numel():
        strides = x.stride(), weight.stride(), r.stride(), s.stride(), (0, 0) if bias is None else bias.stride()
        plan = _plan_fwd(y.shape, x.shape, strides, activation, *_where(x))
        launch(plan, x, weight, r, s, bias, y, z if save_preactivation else None)
    return y, z


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    saved: Tensor,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_r: bool,
    need_s: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx like x, dW [O, I], dr [E, I], ds [E, O], db [E, O]), an empty tensor in place of each that is not needed."""
    grad, x, weight, r, s, saved = (t.resolve_neg() for t in (grad, x, weight, r, s, saved))
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    shapes = (weight.shape, need_weight), (r.shape, need_r), (s.shape, need_s), (s.shape, need_bias)
    sums = [x.new_empty(shape if needed else 0) for shape, needed in shapes]
    if grad.numel() == 0:
        return dx.zero_(), *(t.zero_() for t in sums)
    if x.shape[-1] == 0:
        sums[2].zero_()
        need_s = False

    where = _where(x)
    saved, saved_strides = (None, (0, 0, 0)) if activation is None else (saved, saved.stride())
    strides = grad.stride(), saved_strides, x.stride(), weight.stride(), r.stride(), s.stride()
    if dx.numel():
        plan = _plan_dgrad(grad.shape, x.shape, strides, dx.stride(), activation, *where)
        launch(plan, grad, saved, weight, r, s, dx)
    need = sums[0].numel() > 0, sums[1].numel() > 0, need_s, need_bias
    if any(need):
        plan, counts, add = _plan_wgrad(grad.shape, x.shape, strides, activation, need, *where)
        parts = [t.new_empty((n, t.numel()), dtype=torch.float32) if n > 1 else None for t, n in zip(sums, counts)]
        results = [(t if p is None else p) if needed else None for t, p, needed in zip(sums, parts, need)]
        launch(plan, grad, saved, x, weight, r, s, *results)
        if add is not None:
            launch(add, *parts[:3], *(None if p is None else t for t, p in zip(sums[:3], parts)))
    return dx, *sums


# ------------------------------------------------------------------------------------------------ plans


def _where(x: Tensor) -> tuple[torch.dtype, str, int]:
    return x.dtype, precision(x.dtype), capability(x.device)


@lru_cache(maxsize=4096)
def _plan_fwd(y_shape, x_shape, strides, activation, dtype, how, capability) -> Plan:
    (members, rows, outputs), inputs = y_shape, x_shape[-1]
    x, weight, r, s, bias = strides
    x, scales = _by_member(x), (r, s, bias)
    fold = _folds(members, rows, x, *scales)
    products, height = (1, members * rows) if fold else (members, rows)
    layout = _layout(inputs, outputs, (x, (0, *weight)), scales)
    tile = choose_tile(
        products, height, outputs, dtype, how, capability, layout, activation=activation is not None, scales=1 + fold
    )
    return Plan.of(
        rank1_linear_fwd_kernel,
        products * triton.cdiv(height, tile.BLOCK_M) * triton.cdiv(outputs, tile.BLOCK_N),
        (members, rows, outputs, inputs, *x, *weight, *r, *s, *bias),
        tile,
        FOLD=fold,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=inputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_dgrad(g_shape, x_shape, strides, dx_strides, activation, dtype, how, capability) -> Plan:
    (members, rows, outputs), inputs = g_shape, x_shape[-1]
    grad, saved, _, weight, r, s = strides
    shared, dx = len(x_shape) == 2, _by_member(dx_strides)
    # Results are stored by one stride per row.
    fold = not shared and dx[0] == rows * dx[1] and _folds(members, rows, grad, saved, r, s)
    products, height = (1, members * rows) if fold else (1 if shared else members, rows)
    layout = _layout(inputs, outputs, (grad, saved, (0, *weight), dx), (r, s))
    tile = choose_tile(
        products, height, inputs, dtype, how, capability, layout, slope=activation is not None, scales=1 + fold,
        accumulators=1 + shared,
    )  # fmt: skip
    if shared:
        _check_steps(members, outputs, tile)
    return Plan.of(
        rank1_linear_dgrad_kernel,
        products * triton.cdiv(height, tile.BLOCK_M) * triton.cdiv(inputs, tile.BLOCK_N),
        (members, rows, outputs, inputs, *grad, *saved, *weight, *r, *s, *dx),
        tile,
        SHARED=shared,
        FOLD=fold,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=outputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


class Sums(NamedTuple):
    """The launch that makes dW, dr, ds and db, how many parts it makes of each, and the launch that adds them up."""

    plan: Plan
    counts: tuple[int, int, int, int]
    add: Plan | None


@lru_cache(maxsize=4096)
def _plan_wgrad(g_shape, x_shape, strides, activation, need, dtype, how, capability) -> Sums:
    (members, rows, outputs), inputs = g_shape, x_shape[-1]
    grad, saved, x, weight, r, s = strides
    x = _by_member(x)
    layout = _layout(inputs, outputs, (grad, saved, x, (0, *weight)), (r, s))
    tile = choose_tile(
        members, outputs, inputs, dtype, how, capability, layout, slope=activation is not None, accumulators=2
    )
    _check_steps(members, rows, tile)
    row_tiles, column_tiles = triton.cdiv(outputs, tile.BLOCK_M), triton.cdiv(inputs, tile.BLOCK_N)
    all_tiles = any(need[:3]) * column_tiles + need[3]
    # As few groups of members as fill the GPU: dW has a part of each.
    span = triton.cdiv(members, triton.cdiv(fill(capability), row_tiles * all_tiles))
    groups = triton.cdiv(members, span)
    plan = Plan.of(
        rank1_linear_wgrad_kernel,
        groups * row_tiles * all_tiles,
        (members, rows, outputs, inputs, span, *grad, *saved, *x, *weight, *r, *s),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=rows % tile.BLOCK_K == 0,
        PRECISION=how,
    )
    counts = tuple(n if needed else 0 for n, needed in zip((groups, row_tiles, column_tiles, 1), need))
    sizes = tuple(
        n if count > 1 else 0 for n, count in zip((outputs * inputs, members * inputs, members * outputs), counts)
    )
    if not any(sizes):
        return Sums(plan, counts, None)
    block = Block()
    add = Plan.of(
        rank1_linear_add_kernel, sum(triton.cdiv(n, block.BLOCK) for n in sizes), (*sizes, *counts[:3]), block
    )
    return Sums(plan, counts, add)


def _by_member(strides: tuple[int, ...]) -> tuple[int, ...]:
    """(member, row, feature) strides; a shared [B, I] tensor is the same for every member."""
    return strides if len(strides) == 3 else (0, *strides)


def _layout(
    inputs: int, outputs: int, tensors: tuple[tuple[int, ...], ...], scales: tuple[tuple[int, ...], ...]
) -> Layout:
    """Scales and biases are small: their strides make offsets wide, but need not be aligned."""
    layout = Layout.of(inputs, outputs, *tensors)
    return layout._replace(wide=layout.wide or Layout.of(0, 0, *((0, 0, feature) for _, feature in scales)).wide)


def _folds(members: int, rows: int, *strides: tuple[int, ...]) -> bool:
    """Whether all members make one product: where tiles of one member alone would be partly empty or would make little
    use of W, and where indices and offsets over (member, row) fit 32 bits, with room for a tile's own."""
    return (
        1 < members
        and rows < 128
        and rows % 64 != 0
        and members * rows < 1 << 30
        and all(members * s[0] + rows * max(s[1:]) < 1 << 30 for s in strides)
    )


def _check_steps(members: int, size: int, tile: Tile) -> None:
    if members * triton.cdiv(size, tile.BLOCK_K) >= 1 << 30:
        raise ValueError(f"rank1_linear: a sum over {members} members of {size} terms each has too many steps")
