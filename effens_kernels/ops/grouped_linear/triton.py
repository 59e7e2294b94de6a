"""grouped_linear in Triton: one launch forward, one for dx, one for dW with db.

A shared x [B, I] is never expanded.  Its dx is one sum over members and outputs.  Its y and dW are E products that
read the same x or, where O is small, one product with E*O columns or rows, so that no tile is mostly empty.  In the
kernels FOLD marks such an index over (member, output).
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
    load_tile,
    narrow,
    operand,
    precision,
    program_tile,
    row_sums,
    store_tile,
)

# Kernels keep the grouping of their arguments: tensors, sizes, (member, row, feature) strides, choices.
# fmt: off


@triton.jit(do_not_specialize=["members", "rows"])
def grouped_linear_fwd_kernel(
    x, weight, bias, y, z,
    members, rows, outputs, inputs,
    x_member, x_row, x_in, w_member, w_out, w_in, b_member, b_out,
    FOLD: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = act(x W^T + b) as [rows, outputs] = [rows, inputs] x [outputs, inputs]^T; z receives the pre-activation."""
    columns = outputs
    if FOLD:
        columns = outputs * members
    member, m, n = program_tile(rows, tl.cdiv(columns, BLOCK_N), BLOCK_M)  # with FOLD, member is 0
    y_member = tl.cast(rows, tl.int64) * outputs

    x_rows = lines(x + member * x_member, m, rows, x_row, 1, 0, False, WIDE, BLOCK_M)
    x_rows = operand(x_rows, x_in, 0, False, WIDE, BLOCK_K)
    w_rows = lines(weight + member * w_member, n, columns, w_out, outputs, w_member, FOLD, WIDE, BLOCK_N)
    w_rows = operand(w_rows, w_in, 0, False, WIDE, BLOCK_K)
    acc = contract(load_tile, x_rows, None, load_tile, w_rows, None, inputs, 1,
                   False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)

    if bias is not None:
        p, offsets, valid = lines(bias + member * b_member, n, columns, b_out, outputs, b_member, FOLD, WIDE, BLOCK_N)
        acc += tl.load(p + offsets, mask=valid, other=0.0).to(tl.float32)[None, :]
    if z is not None:
        store_tile(z + member * y_member, acc, m, rows, outputs, n, columns, 1, outputs, y_member,
                   FOLD, WIDE, BLOCK_M, BLOCK_N)
    store_tile(y + member * y_member, activate(acc, ACTIVATION), m, rows, outputs, n, columns, 1, outputs, y_member,
               FOLD, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["members", "rows"])
def grouped_linear_dgrad_kernel(
    grad, saved, weight, dx,
    members, rows, outputs, inputs,
    g_member, g_row, g_out, s_member, s_row, s_out, w_member, w_out, w_in, dx_member, dx_row, dx_in,
    FOLD: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx = g W as [rows, inputs] = [rows, outputs] x [inputs, outputs]^T, g = grad * act'; FOLD sums over members."""
    member, m, n = program_tile(rows, tl.cdiv(inputs, BLOCK_N), BLOCK_M)
    size = outputs
    if FOLD:
        size = outputs * members

    g = lines(grad + member * g_member, m, rows, g_row, 1, 0, False, WIDE, BLOCK_M)
    g = operand(g, g_out, g_member, FOLD, WIDE, BLOCK_K)
    s = g
    if ACTIVATION is not None:
        s = lines(saved + member * s_member, m, rows, s_row, 1, 0, False, WIDE, BLOCK_M)
        s = operand(s, s_out, s_member, FOLD, WIDE, BLOCK_K)
    w = lines(weight + member * w_member, n, inputs, w_in, 1, 0, False, WIDE, BLOCK_N)
    w = operand(w, w_out, w_member, FOLD, WIDE, BLOCK_K)
    acc = contract(load_gradient, (g, s), ACTIVATION, load_tile, w, None, size, outputs,
                   FOLD, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    store_tile(dx + member * dx_member, acc, m, rows, dx_row, n, inputs, dx_in, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["members", "rows"])
def grouped_linear_wgrad_kernel(
    grad, saved, x, dw, db,
    members, rows, outputs, inputs,
    g_member, g_row, g_out, s_member, s_row, s_out, x_member, x_row, x_in,
    FOLD: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dW = g^T x as [outputs, inputs] = [outputs, rows] x [inputs, rows]^T; db = row sums of g^T, by the programs of
    one further column tile.  Either of dw and db may be None."""
    height = outputs
    if FOLD:
        height = outputs * members
    column_tiles = 0
    if dw is not None:
        column_tiles = tl.cdiv(inputs, BLOCK_N)
    all_tiles = column_tiles
    if db is not None:
        all_tiles = column_tiles + 1
    member, m, n = program_tile(height, all_tiles, BLOCK_M)  # with FOLD, member is 0

    g = lines(grad + member * g_member, m, height, g_out, outputs, g_member, FOLD, WIDE, BLOCK_M)
    g = operand(g, g_row, 0, False, WIDE, BLOCK_K)
    s = g
    if ACTIVATION is not None:
        s = lines(saved + member * s_member, m, height, s_out, outputs, s_member, FOLD, WIDE, BLOCK_M)
        s = operand(s, s_row, 0, False, WIDE, BLOCK_K)
    if dw is not None:
        if n < column_tiles:
            x_columns = lines(x + member * x_member, n, inputs, x_in, 1, 0, False, WIDE, BLOCK_N)
            x_columns = operand(x_columns, x_row, 0, False, WIDE, BLOCK_K)
            acc = contract(load_gradient, (g, s), ACTIVATION, load_tile, x_columns, None, rows, 1,
                           False, WIDE, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            store_tile(dw + member * outputs * inputs, acc, m, height, inputs, n, inputs, 1, 1, 0,
                       False, WIDE, BLOCK_M, BLOCK_N)
    if db is not None:
        if n == column_tiles:
            sums = row_sums(load_gradient, (g, s), ACTIVATION, rows, 1, False, WIDE, EVEN_K, BLOCK_M, BLOCK_K)
            p, offsets, valid = lines(db + member * outputs, m, height, 1, 1, 0, False, WIDE, BLOCK_M)
            tl.store(p + offsets, narrow(sums, db.dtype.element_ty), mask=valid)


# fmt: on


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, save_preactivation: bool
) -> tuple[Tensor, Tensor]:
    """(y, z): act(z) contiguous [E, B, O], and z likewise, or empty where it need not be saved."""
    x, weight, bias = x.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg()
    y = x.new_empty((weight.shape[0], x.shape[-2], weight.shape[1]))
    z = x.new_empty(y.shape if save_preactivation else 0)
    if y.numel():
        b_strides = (0, 0) if bias is None else bias.stride()
        plan = _plan_fwd(x.shape, x.stride(), weight.shape, weight.stride(), b_strides, activation, *_where(x))
        launch(plan, x, weight, bias, y, z if save_preactivation else None)
    return y, z


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
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
    where = _where(x)
    saved, s_strides = (None, (0, 0, 0)) if activation is None else (saved, saved.stride())
    if dx.numel():
        plan = _plan_dgrad(
            grad.shape, grad.stride(), s_strides, weight.stride(), dx.shape, dx.stride(), activation, *where
        )
        launch(plan, grad, saved, weight, dx)
    if dw.numel() or db.numel():
        need = dw.numel() > 0, db.numel() > 0
        plan = _plan_wgrad(grad.shape, grad.stride(), s_strides, x.shape, x.stride(), activation, *need, *where)
        launch(plan, grad, saved, x, dw if need[0] else None, db if need[1] else None)
    return dx, dw, db


# ------------------------------------------------------------------------------------------------ plans


def _where(x: Tensor) -> tuple[torch.dtype, str, int]:
    return x.dtype, precision(x.dtype), capability(x.device)


@lru_cache(maxsize=4096)
def _plan_fwd(x_shape, x_strides, w_shape, w_strides, b_strides, activation, dtype, how, capability) -> Plan:
    members, outputs, inputs = w_shape
    rows = x_shape[-2]
    fold = len(x_shape) == 2 and _folds(members, outputs, w_strides, b_strides, (rows * outputs, outputs))
    products, columns = (1, members * outputs) if fold else (members, outputs)
    x_strides = _by_member(x_strides)
    layout = Layout.of(inputs, outputs, x_strides, w_strides)
    tile = choose_tile(products, rows, columns, dtype, how, capability, layout, activation=activation is not None)
    return Plan.of(
        grouped_linear_fwd_kernel,
        products * triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N),
        (members, rows, outputs, inputs, *x_strides, *w_strides, *b_strides),
        tile,
        FOLD=fold,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=inputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_dgrad(
    g_shape, g_strides, s_strides, w_strides, dx_shape, dx_strides, activation, dtype, how, capability
) -> Plan:
    (members, rows, outputs), inputs = g_shape, dx_shape[-1]
    fold = len(dx_shape) == 2
    products, size = (1, members * outputs) if fold else (members, outputs)
    if size >= 1 << 30:
        raise ValueError(f"grouped_linear: a sum over {members} members of {outputs} outputs has 2**30 terms or more")
    dx_strides = _by_member(dx_strides)
    layout = Layout.of(inputs, outputs, g_strides, s_strides, w_strides, dx_strides)
    if fold and not _narrow(members, outputs, g_strides, s_strides, w_strides):
        layout = layout._replace(wide=True)
    tile = choose_tile(products, rows, inputs, dtype, how, capability, layout, slope=activation is not None)
    return Plan.of(
        grouped_linear_dgrad_kernel,
        products * triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(inputs, tile.BLOCK_N),
        (members, rows, outputs, inputs, *g_strides, *s_strides, *w_strides, *dx_strides),
        tile,
        FOLD=fold,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=size % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_wgrad(
    g_shape, g_strides, s_strides, x_shape, x_strides, activation, need_weight, need_bias, dtype, how, capability
) -> Plan:
    (members, rows, outputs), inputs = g_shape, x_shape[-1]
    fold = len(x_shape) == 2 and _folds(members, outputs, g_strides, s_strides)
    products, height = (1, members * outputs) if fold else (members, outputs)
    x_strides = _by_member(x_strides)
    layout = Layout.of(inputs, outputs, g_strides, s_strides, x_strides)
    tile = choose_tile(products, height, inputs, dtype, how, capability, layout, slope=activation is not None)
    column_tiles = need_weight * triton.cdiv(inputs, tile.BLOCK_N) + need_bias
    return Plan.of(
        grouped_linear_wgrad_kernel,
        products * triton.cdiv(height, tile.BLOCK_M) * column_tiles,
        (members, rows, outputs, inputs, *g_strides, *s_strides, *x_strides),
        tile,
        FOLD=fold,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=rows % tile.BLOCK_K == 0,
        PRECISION=how,
    )


def _by_member(strides: tuple[int, ...]) -> tuple[int, ...]:
    """(member, row, feature) strides; a shared [B, I] tensor is the same for every member."""
    return strides if len(strides) == 3 else (0, *strides)


def _folds(members: int, outputs: int, *strides: tuple[int, ...]) -> bool:
    """Whether a shared x is worth one product over all members: where tiles of one member alone would waste much."""
    return outputs < 512 and outputs % 64 != 0 and _narrow(members, outputs, *strides)


def _narrow(members: int, outputs: int, *strides: tuple[int, ...]) -> bool:
    """Whether indices and offsets over (member, output) fit 32 bits, with room for a tile's own."""
    return members * outputs < 1 << 30 and all(members * s[0] + outputs * max(s[1:]) < 1 << 30 for s in strides)
