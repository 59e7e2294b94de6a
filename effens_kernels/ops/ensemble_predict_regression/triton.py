"""ensemble_predict_regression in Triton: one launch each way, which read means and variances once.

The sum of squares about the mean goes on from one member to the next (Welford 1962), of differences from the first
one, which a large common offset costs no precision.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_engine import Block, Plan, capability, fill, launch, narrow

# Kernels keep the grouping of their arguments: tensors, sizes, strides, choices.
# fmt: off


@triton.jit
def member_columns(pointer, block, member, columns, member_stride, stride, BLOCK: tl.constexpr):
    """(pointers to some columns of a member, which of them are there)."""
    n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return pointer + tl.cast(member, tl.int64) * member_stride + n * stride, n < columns


@triton.jit(do_not_specialize=["members"])
def ensemble_predict_regression_fwd_kernel(
    means, variances, mean, variance, aleatoric, epistemic,
    members, columns,
    m_member, m_column, v_member, v_column,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    here, valid = member_columns(means, block, 0, columns, m_member, m_column, BLOCK)
    if variances is not None:
        there, _valid = member_columns(variances, block, 0, columns, v_member, v_column, BLOCK)
    origin = tl.load(here, mask=valid, other=0.0).to(tl.float32)
    middle = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    noise = tl.zeros((BLOCK,), tl.float32)
    for e in range(0, members):
        others = tl.cast(e, tl.float32)
        share = 1 / (others + 1)
        now = tl.load(here, mask=valid, other=0.0).to(tl.float32)
        difference = now - origin - middle
        total += now
        middle += difference * share
        squares += difference * difference * (others * share)
        here += m_member
        if variances is not None:
            noise += tl.load(there, mask=valid, other=0.0).to(tl.float32)
            there += v_member
    squares = squares / members.to(tl.float32)
    noise = noise / members.to(tl.float32)
    n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(mean + n, total / members.to(tl.float32), mask=valid)
    tl.store(variance + n, squares + noise, mask=valid)
    tl.store(aleatoric + n, noise, mask=valid)
    tl.store(epistemic + n, squares, mask=valid)


@triton.jit
def load_or_zero(pointer, n, valid):
    if pointer is None:
        return tl.zeros(n.shape, tl.float32)
    else:
        return tl.load(pointer + n, mask=valid, other=0.0)


@triton.jit(do_not_specialize=["members", "span"])
def ensemble_predict_regression_bwd_kernel(
    means, mean, grad_mean, grad_variance, grad_aleatoric, grad_epistemic, dmeans, dvariances,
    members, columns, span,
    m_member, m_column,
    BLOCK: tl.constexpr,
):
    """dmeans and dvariances, those that are wanted, of some columns of `span` members."""
    spans = tl.cdiv(members, span)
    first = tl.program_id(0) % spans * span
    block = tl.program_id(0) // spans
    n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here, valid = member_columns(means, block, first, columns, m_member, m_column, BLOCK)
    of_variance = load_or_zero(grad_variance, n, valid)
    count = members.to(tl.float32)
    noise = (of_variance + load_or_zero(grad_aleatoric, n, valid)) / count
    constant = load_or_zero(grad_mean, n, valid) / count
    by = 2 * (of_variance + load_or_zero(grad_epistemic, n, valid)) / count
    middle = load_or_zero(mean, n, valid)
    at = tl.cast(first, tl.int64) * columns + n
    for _ in range(first, tl.minimum(first + span, members)):
        if dmeans is not None:
            apart = tl.load(here, mask=valid, other=0.0).to(tl.float32) - middle
            tl.store(dmeans + at, narrow(constant + by * apart, dmeans.dtype.element_ty), mask=valid)
            here += m_member
        if dvariances is not None:
            tl.store(dvariances + at, narrow(noise, dvariances.dtype.element_ty), mask=valid)
        at += columns


# fmt: on


def fwd(means: Tensor, variances: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, variance, aleatoric, epistemic) [N], float32."""
    means = means.resolve_neg()
    variances = None if variances is None else variances.resolve_neg()
    results = [means.new_empty(means.shape[1], dtype=torch.float32) for _ in range(4)]
    if means.shape[1]:
        strides = *means.stride(), *((0, 0) if variances is None else variances.stride())
        launch(_plan_fwd(*means.shape, strides, capability(means.device)), means, variances, *results)
    return tuple(results)


def bwd(
    means: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    grad_aleatoric: Tensor,
    grad_epistemic: Tensor,
    need_means: bool,
    need_variances: bool,
) -> tuple[Tensor, Tensor]:
    """(dmeans, dvariances) [E, N], an empty tensor in place of each that is not needed; so are gradients not given."""
    means = means.resolve_neg()
    results = [means.new_empty(means.shape if needed else 0) for needed in (need_means, need_variances)]
    if means.numel() and (need_means or need_variances):
        grads = (g if g.numel() else None for g in (grad_mean, grad_variance, grad_aleatoric, grad_epistemic))
        wanted = (r if needed else None for r, needed in zip(results, (need_means, need_variances)))
        plan = _plan_bwd(*means.shape, means.stride(), capability(means.device))
        launch(plan, means, mean if need_means else None, *grads, *wanted)
    return tuple(results)


@lru_cache(maxsize=4096)
def _plan_fwd(members: int, columns: int, strides: tuple[int, ...], capability: int) -> Plan:
    block = _block(columns, capability)
    programs = triton.cdiv(columns, block.BLOCK)
    return Plan.of(ensemble_predict_regression_fwd_kernel, programs, (members, columns, *strides), block)


@lru_cache(maxsize=4096)
def _plan_bwd(members: int, columns: int, strides: tuple[int, int], capability: int) -> Plan:
    block = _block(columns, capability)
    blocks = triton.cdiv(columns, block.BLOCK)
    span = triton.cdiv(members, min(members, max(1, 8 * fill(capability) // blocks)))
    programs = blocks * triton.cdiv(members, span)
    return Plan.of(ensemble_predict_regression_bwd_kernel, programs, (members, columns, span, *strides), block)


def _block(columns: int, capability: int) -> Block:
    """Four columns a thread, where these leave programs for all of the GPU."""
    return Block(512) if columns >= 2048 * fill(capability) else Block(128)
