"""sgd_step and adamw_step: one step of an optimizer on stacked parameters, in place, each member by its own numbers.

Not public: `effens_kernels.optim` has the optimizers and their checks.  Parameters, gradients and states of a call are
lists of tensors `[E, ...]` of one dtype and one device (of any shape, where E is 1), coefficients `[P, E, K]`, float64
on the CPU, of `coefficients.py`.  Parameters, gradients and states are read once, and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ... import _dispatch
from .._backend_modules import backend_modules
from .._registration import is_plain_eager

Tensors = Sequence[Tensor]
kernels = backend_modules(__package__)  # of sgd_step_ and adamw_step_


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    coefficients: Tensor,
    nesterov: bool,
    backend: str | None,
) -> None:
    """`momentum_buffers` may be empty: then no member has momentum."""

    def run(on: ModuleType, params: Tensors, grads: Tensors, momentum_buffers: Tensors) -> None:
        on.sgd_step_(params, grads, momentum_buffers, coefficients, nesterov)

    _run("sgd_step", run, backend, params, grads, [momentum_buffers], coefficients)


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    coefficients: Tensor,
    backend: str | None,
) -> None:
    """`max_exp_avg_sqs` may be empty: then without amsgrad."""

    def run(on: ModuleType, *tensors: Tensors) -> None:
        on.adamw_step_(*tensors, coefficients)

    _run("adamw_step", run, backend, params, grads, [exp_avgs, exp_avg_sqs, max_exp_avg_sqs], coefficients)


def _run(
    op: str,
    run: Callable[..., None],
    backend: str | None,
    params: Tensors,
    grads: Tensors,
    states: list[Tensors],
    coefficients: Tensor,
) -> None:
    chosen = _dispatch.select(_dispatch.Problem(op, params[0].device.type, params[0].dtype), backend)
    # What has to see each operation (modes, subclasses) sees PyTorch's own.
    if chosen == "reference" or not is_plain_eager(*params, *grads):
        return run(kernels("reference"), params, grads, *states)
    given = [params, grads, *(state for state in states if state)]
    axis = int(coefficients.shape[1] > 1)
    laid_out = list(zip(*(_laid_out(tensors, axis) for tensors in zip(*given))))
    rows = iter(laid_out)
    run(kernels(chosen), next(rows), next(rows), *(next(rows) if state else [] for state in states))
    torch.autograd.graph.increment_version(params)  # autograd finds out who still needs what they were
    for tensors, own in zip(given, laid_out):
        for t, copy in zip(tensors, own):
            if t is not copy and tensors is not grads:
                t.copy_(copy)


def _laid_out(tensors: tuple[Tensor, ...], axis: int) -> tuple[Tensor, ...]:
    """A parameter, its gradient and states as kernels take them: members without gaps, all in one order in memory.

    So they are, mostly, whatever the order and the stride between members.  A gradient that is not is copied; where
    parameters are not, all are.
    """
    param, grad, *states = tensors
    shape, *strides = param.shape[axis:], *(t.stride()[axis:] for t in tensors)
    if _lie_alike(shape, *strides) and not grad.is_neg():
        return tensors
    if _lie_alike(shape, strides[0], *strides[2:]):
        like = torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device)
        return param, like.copy_(grad), *states
    return tuple(t.resolve_neg().contiguous() for t in tensors)


@lru_cache(maxsize=4096)
def _lie_alike(shape: tuple[int, ...], *strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    own = {tuple((stride, size) for stride, size in zip(each, shape) if size > 1) for each in strides}
    expected = 1
    for stride, size in sorted(min(own)):
        if stride != expected:
            return False
        expected *= size
    return len(own) == 1
