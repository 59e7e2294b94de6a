"""sgd_step and adamw_step in Triton: one launch for each parameter, whose programs take some numbers of one member."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_engine import Block, Plan, launch, narrow

Tensors = Sequence[Tensor]
_BLOCK = Block(1024)

# fmt: off


@triton.jit
def _place(size, BLOCK: tl.constexpr):
    """(member, numbers of it) of this program."""
    blocks = tl.cdiv(size, BLOCK)
    member = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return member, j


@triton.jit
def _load(pointer, valid):
    return tl.load(pointer, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, valid):
    tl.store(pointer, narrow(value, pointer.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["size"])
def sgd_step_kernel(
    param, grad, buffer, table,
    size, p_member, g_member, b_member,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):
    """d = sign g + weight_decay p,  b = kept b + fresh d,  p -= lr times d, or b, or d + momentum b."""
    member, j = _place(size, BLOCK)
    by = table + member * 7
    valid = j < tl.where(tl.load(by) != 0, size, 0)
    weight_decay, momentum = tl.load(by + 2), tl.load(by + 3)
    p = _load(param + member * p_member + j, valid)
    d = _load(grad + member * g_member + j, valid) * tl.load(by + 1)
    d = tl.where(weight_decay != 0, d + p * weight_decay, d)
    if buffer is not None:
        has = j < tl.where((tl.load(by) != 0) & (momentum != 0), size, 0)
        b = _load(buffer + member * b_member + j, has) * tl.load(by + 4) + d * tl.load(by + 5)
        _store(buffer + member * b_member + j, b, has)
        if NESTEROV:
            d = tl.where(has, d + b * momentum, d)
        else:
            d = tl.where(has, b, d)
    _store(param + member * p_member + j, p - d * tl.load(by + 6), valid)


@triton.jit(do_not_specialize=["size"])
def adamw_step_kernel(
    param, grad, average, square, most, table,
    size, p_member, g_member, a_member, s_member, m_member,
    BLOCK: tl.constexpr,
):
    """m += grad_share (sign g - m),  v = kept v + square_share g^2,
    p = decay p - step_size m / (sqrt(v) inverse_root + eps), with the largest v so far where `most` keeps it."""
    member, j = _place(size, BLOCK)
    by = table + member * 9
    valid = j < tl.where(tl.load(by) != 0, size, 0)
    g = _load(grad + member * g_member + j, valid) * tl.load(by + 1)
    m = _load(average + member * a_member + j, valid)
    m += (g - m) * tl.load(by + 3)
    v = _load(square + member * s_member + j, valid) * tl.load(by + 4) + g * tl.load(by + 5) * g
    _store(average + member * a_member + j, m, valid)
    _store(square + member * s_member + j, v, valid)
    if most is not None:
        w = _load(most + member * m_member + j, valid)
        v = tl.where(v < w, w, tl.where(w == w, v, w))  # a NaN of either stays one
        _store(most + member * m_member + j, v, valid)
    step = tl.div_rn(m * tl.load(by + 8), tl.sqrt_rn(v) * tl.load(by + 6) + tl.load(by + 7))
    p = _load(param + member * p_member + j, valid) * tl.load(by + 2)
    _store(param + member * p_member + j, p - step, valid)


# fmt: on


def sgd_step_(params: Tensors, grads: Tensors, momentum_buffers: Tensors, coefficients: Tensor, nesterov: bool) -> None:
    for tensors, table in _each(params, grads, [momentum_buffers], coefficients):
        launch(_plan(sgd_step_kernel, len(table), *_sizes(tensors, len(table)), NESTEROV=nesterov), *tensors, table)


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    coefficients: Tensor,
) -> None:
    for tensors, table in _each(params, grads, [exp_avgs, exp_avg_sqs, max_exp_avg_sqs], coefficients):
        launch(_plan(adamw_step_kernel, len(table), *_sizes(tensors, len(table))), *tensors, table)


def _each(params: Tensors, grads: Tensors, states: list[Tensors], coefficients: Tensor):
    """What a launch takes: (param, grad, states or None), coefficients on their device."""
    tables = coefficients.to(params[0].device, torch.float32)
    columns = [params, grads, *(state or [None] * len(params) for state in states)]
    return [(tensors, table) for tensors, table in zip(zip(*columns), tables.unbind()) if tensors[0].numel()]


def _sizes(tensors: tuple[Tensor | None, ...], members: int) -> tuple[int, ...]:
    """Of a member, and the stride between members in each tensor."""
    strides = (0 if t is None or members == 1 else t.stride(0) for t in tensors)
    return tensors[0].numel() // members, *strides


@lru_cache(maxsize=4096)
def _plan(kernel: triton.JITFunction, members: int, size: int, *strides: int, **switches: bool) -> Plan:
    programs = members * triton.cdiv(size, _BLOCK.BLOCK)
    return Plan.of(kernel, programs, (size, *strides), _BLOCK, **switches)
