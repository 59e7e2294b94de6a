"""indexed_linear in Triton: one launch forward, one for dx, one for dW with db; each of the latter after a small sort.

Forward, the programs of a group read the numbers of its input and its weight, and start there.  Backward, those of an
input (or of a weight) go through its groups, in their order and in one accumulator; a stable sort of the index says
which these are.  No input or weight is gathered, nothing is added by atomics, and the host reads no index.

A group with a number out of range, which cannot be refused without waiting for the device, gives zeros and has no part
in any gradient.
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
    multiply,
    operand,
    precision,
    program_tile,
    store_line,
    store_tile,
)
from ..triton_segments import Segments, load_number, of_group

# Kernels keep the grouping of their arguments: tensors, sizes, (matrix, row, feature) strides, choices.
# fmt: off


@triton.jit(do_not_specialize=["sources", "members", "rows"])
def indexed_linear_fwd_kernel(
    x, weight, x_index, weight_index, bias, y, z,
    sources, members, rows, outputs, inputs,
    x_source, x_row, x_in, w_member, w_out, w_in, b_member, b_out,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = act(x W^T + b) as [rows, outputs] = [rows, inputs] x [outputs, inputs]^T; z receives the pre-activation."""
    group, m, n = program_tile(rows, tl.cdiv(outputs, BLOCK_N), BLOCK_M)
    source, has_source = load_number(x_index + group, sources)
    member, has_member = load_number(weight_index + group, members)
    inside = has_source & has_member
    to = group * rows * outputs

    x_rows = lines(x + source * x_source, m, rows, x_row, 1, 0, False, WIDE, BLOCK_M)
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
        store_tile(z + to, acc, m, rows, outputs, n, outputs, 1, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)
    store_tile(y + to, activate(acc, ACTIVATION), m, rows, outputs, n, outputs, 1, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["members", "rows"])
def indexed_linear_dgrad_kernel(
    grad, saved, weight, groups, others, bounds, dx,
    members, rows, outputs, inputs,
    g_group, g_row, g_out, s_group, s_row, s_out, w_member, w_out, w_in, dx_source, dx_row, dx_in,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx = sum of g W over an input's groups, as [rows, inputs] = [rows, outputs] x [inputs, outputs]^T, where
    g = grad * act'."""
    source, m, n = program_tile(rows, tl.cdiv(inputs, BLOCK_N), BLOCK_M)

    g = operand(lines(grad, m, rows, g_row, 1, 0, False, WIDE, BLOCK_M), g_out, 0, False, WIDE, BLOCK_K)
    s = g
    if ACTIVATION is not None:
        s = operand(lines(saved, m, rows, s_row, 1, 0, False, WIDE, BLOCK_M), s_out, 0, False, WIDE, BLOCK_K)
    w = operand(lines(weight, n, inputs, w_in, 1, 0, False, WIDE, BLOCK_N), w_out, 0, False, WIDE, BLOCK_K)

    # One loop over groups and outputs, so that the next group's loads are on their way at a group's end.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(outputs, BLOCK_K)
    first, last = tl.load(bounds + source) * steps, tl.load(bounds + source + 1) * steps
    for step in range(first, last):
        group = tl.load(groups + step // steps)
        member, inside = load_number(others + step // steps, members)
        of_g = of_group(g, group, g_group, inside), of_group(s, group, s_group, inside)
        acc = multiply(load_gradient, of_g, ACTIVATION, load_tile, of_group(w, member, w_member, inside), None,
                       acc, step % steps * BLOCK_K, outputs, 1, False, WIDE, EVEN_K, PRECISION, BLOCK_K)
    store_tile(dx + source * dx_source, acc, m, rows, dx_row, n, inputs, dx_in, 1, 0, False, WIDE, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["sources", "rows"])
def indexed_linear_wgrad_kernel(
    grad, saved, x, groups, others, bounds, dw, db,
    sources, rows, outputs, inputs,
    g_group, g_row, g_out, s_group, s_row, s_out, x_source, x_row, x_in,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dW = sum of g^T x over a weight's groups, as [outputs, inputs] = [outputs, rows] x [inputs, rows]^T; db = row
    sums of g^T, by the programs of one further column tile.  Either of dw and db may be None."""
    column_tiles = 0
    if dw is not None:
        column_tiles = tl.cdiv(inputs, BLOCK_N)
    all_tiles = column_tiles
    if db is not None:
        all_tiles = column_tiles + 1
    member, m, n = program_tile(outputs, all_tiles, BLOCK_M)

    g = operand(lines(grad, m, outputs, g_out, 1, 0, False, WIDE, BLOCK_M), g_row, 0, False, WIDE, BLOCK_K)
    s = g
    if ACTIVATION is not None:
        s = operand(lines(saved, m, outputs, s_out, 1, 0, False, WIDE, BLOCK_M), s_row, 0, False, WIDE, BLOCK_K)
    steps = tl.cdiv(rows, BLOCK_K)
    first, last = tl.load(bounds + member) * steps, tl.load(bounds + member + 1) * steps

    if dw is not None:
        if n < column_tiles:
            columns = operand(lines(x, n, inputs, x_in, 1, 0, False, WIDE, BLOCK_N), x_row, 0, False, WIDE, BLOCK_K)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(first, last):
                group = tl.load(groups + step // steps)
                source, inside = load_number(others + step // steps, sources)
                of_g = of_group(g, group, g_group, inside), of_group(s, group, s_group, inside)
                acc = multiply(load_gradient, of_g, ACTIVATION, load_tile, of_group(columns, source, x_source, inside),
                               None, acc, step % steps * BLOCK_K, rows, 1, False, WIDE, EVEN_K, PRECISION, BLOCK_K)
            store_tile(dw + member * outputs * inputs, acc, m, outputs, inputs, n, inputs, 1, 1, 0,
                       False, WIDE, BLOCK_M, BLOCK_N)
    if db is not None:
        if n == column_tiles:
            sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for step in range(first, last):
                group = tl.load(groups + step // steps)
                source, inside = load_number(others + step // steps, sources)
                of_g = of_group(g, group, g_group, inside), of_group(s, group, s_group, inside)
                sums += load_gradient(of_g, step % steps * BLOCK_K, rows, 1, ACTIVATION, False, WIDE, EVEN_K,
                                      BLOCK_K).to(tl.float32)
            store_line(db + member * outputs, tl.sum(sums, 1), m, outputs, BLOCK_M)


# fmt: on


def fwd(
    x: Tensor,
    weight: Tensor,
    x_index: Tensor,
    weight_index: Tensor,
    bias: Tensor | None,
    activation: str | None,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z): act(z) contiguous [G, B, O], and z likewise, or empty where it need not be saved."""
    x, weight, bias = x.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg()
    y = x.new_empty((x_index.shape[0], x.shape[1], weight.shape[1]))
    z = x.new_empty(y.shape if save_preactivation else 0)
    if y.numel():
        strides = x.stride(), weight.stride(), (0, 0) if bias is None else bias.stride()
        plan = _plan_fwd(y.shape[0], x.shape, weight.shape, strides, activation, *_where(x))
        indices = x_index.contiguous(), weight_index.contiguous()
        launch(plan, x, weight, *indices, bias, y, z if save_preactivation else None)
    return y, z


def bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_index: Tensor,
    weight_index: Tensor,
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
    saved, s_strides = (None, (0, 0, 0)) if activation is None else (saved, saved.stride())
    where = _where(x)
    if dx.numel():
        strides = grad.stride(), s_strides, weight.stride(), dx.stride()
        plan = _plan_dgrad(grad.shape, x.shape, weight.shape, strides, activation, *where)
        launch(plan, grad, saved, weight, *Segments.of(x_index, x.shape[0], weight_index), dx)
    if dw.numel() or db.numel():
        need = dw.numel() > 0, db.numel() > 0
        strides = grad.stride(), s_strides, x.stride()
        plan = _plan_wgrad(grad.shape, x.shape, weight.shape, strides, activation, *need, *where)
        segments = Segments.of(weight_index, weight.shape[0], x_index)
        launch(plan, grad, saved, x, *segments, dw if need[0] else None, db if need[1] else None)
    return dx, dw, db


# ------------------------------------------------------------------------------------------------ plans


def _where(x: Tensor) -> tuple[torch.dtype, str, int]:
    return x.dtype, precision(x.dtype), capability(x.device)


@lru_cache(maxsize=4096)
def _plan_fwd(groups, x_shape, w_shape, strides, activation, dtype, how, capability) -> Plan:
    (sources, rows, inputs), (members, outputs, _) = x_shape, w_shape
    x, weight, bias = strides
    layout = Layout.of(inputs, outputs, x, weight)
    tile = choose_tile(groups, rows, outputs, dtype, how, capability, layout, activation=activation is not None)
    return Plan.of(
        indexed_linear_fwd_kernel,
        groups * triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(outputs, tile.BLOCK_N),
        (sources, members, rows, outputs, inputs, *x, *weight, *bias),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=inputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_dgrad(g_shape, x_shape, w_shape, strides, activation, dtype, how, capability) -> Plan:
    (sources, rows, inputs), (members, outputs, _) = x_shape, w_shape
    grad, saved, weight, dx = strides
    layout = Layout.of(inputs, outputs, *strides)
    tile = choose_tile(
        sources, rows, inputs, dtype, how, capability, layout, slope=activation is not None, indirect=True
    )
    _check_steps(g_shape[0], outputs, tile.BLOCK_K)
    return Plan.of(
        indexed_linear_dgrad_kernel,
        sources * triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(inputs, tile.BLOCK_N),
        (members, rows, outputs, inputs, *grad, *saved, *weight, *dx),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=outputs % tile.BLOCK_K == 0,
        PRECISION=how,
    )


@lru_cache(maxsize=4096)
def _plan_wgrad(g_shape, x_shape, w_shape, strides, activation, need_weight, need_bias, dtype, how, capability) -> Plan:
    (sources, rows, inputs), (members, outputs, _) = x_shape, w_shape
    grad, saved, x = strides
    layout = Layout.of(inputs, outputs, *strides)
    tile = choose_tile(
        members, outputs, inputs, dtype, how, capability, layout, slope=activation is not None, indirect=True
    )
    _check_steps(g_shape[0], rows, tile.BLOCK_K)
    column_tiles = need_weight * triton.cdiv(inputs, tile.BLOCK_N) + need_bias
    return Plan.of(
        indexed_linear_wgrad_kernel,
        members * triton.cdiv(outputs, tile.BLOCK_M) * column_tiles,
        (sources, rows, outputs, inputs, *grad, *saved, *x),
        tile,
        WIDE=layout.wide,
        ACTIVATION=activation,
        EVEN_K=rows % tile.BLOCK_K == 0,
        PRECISION=how,
    )


def _check_steps(groups: int, size: int, block: int) -> None:
    """Steps through all groups are counted in 32 bits."""
    if groups * triton.cdiv(size, block) >= 2**31:
        raise ValueError(f"indexed_linear: a sum over {groups} groups of {size} terms has 2**31 steps or more")
