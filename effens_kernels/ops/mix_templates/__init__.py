"""mix_templates: weights as linear combinations of templates, for any shape of weight."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_alike, check_tensor, reject
from . import autograd, batching, reference  # noqa: F401  (batching registers the vmap rules)

__all__ = ["mix_templates"]


def mix_templates(coefficients: Tensor, templates: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Combine templates linearly, once for each row of coefficients.

    .. math:: \theta_m = \sum_{t=1}^{T} \alpha_{mt} \, T_t

    for every leading index `m` of the coefficients, such as (member, layer): how MixtureEnsembles makes the weights of
    its members (Teterwak et al. 2021, "MixtureEnsembles: Leveraging Parameter Sharing for Efficient Ensembles",
    equation 1).  Forward reads each template once for all members; backward reads templates and the incoming gradient
    once and gives both gradients.

    Args:
        coefficients: `[*, T]`, of any number of leading axes.
        templates: `[T, *shape]`, of any shape of weight.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[*, *shape]`, in the dtype of the arguments (under autocast: its dtype).  Sums are accumulated in float32 at
        least.  Each weight lies in memory as the templates do: channels_last stays channels_last.

    Both tensors share one dtype (float32, float16, bfloat16, float64) and one device.  Any strides are accepted;
    templates that are views with gaps are copied once.  An empty leading axis or shape gives empty results.
    Differentiable any number of times in both tensors, which are all that is kept for backward.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: no templates, or not as many as coefficients; devices differ; unknown backend; a backend that
            cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> templates = torch.randn(3, 64, 32, 3, 3)             # 3 templates of a convolution
        >>> coefficients = torch.randn(4, 2, 3)                  # for 4 members of 2 layers
        >>> ek.mix_templates(coefficients, templates).shape
        torch.Size([4, 2, 64, 32, 3, 3])
    """
    coefficients, templates = autocast(coefficients, templates)
    op = "mix_templates"
    check_tensor(op, "coefficients", coefficients)
    check_tensor(op, "templates", templates)
    check_alike(op, "coefficients", coefficients, "templates", templates)
    check(op, coefficients, templates)
    leading, shape, count = coefficients.shape[:-1], templates.shape[1:], templates.shape[0]
    sizes = prod(leading), count, prod(shape)
    problem = _dispatch.Problem(op, templates.device.type, templates.dtype, sizes, templates.device.index)
    chosen = _dispatch.select(problem, backend)
    rows, (columns, shaped) = coefficients.reshape(sizes[0], count), flat(templates)
    if chosen == "reference":
        mixed = reference.mix_templates(rows, columns)
    else:
        mixed = autograd.apply(rows, columns, chosen)
    return shaped(mixed.view(*leading, sizes[2]))


def check(op: str, coefficients: Tensor, templates: Tensor) -> None:
    """What the two arguments have to be to each other."""
    if templates.dim() < 1:
        reject(op, "templates", "[T, *shape]", templates)
    if templates.shape[0] == 0:
        reject(op, "templates", "[T, *shape] of at least one template", templates)
    if coefficients.dim() < 1:
        reject(op, "coefficients", "[*, T]", coefficients)
    if coefficients.shape[-1] != templates.shape[0]:
        fitting = f"[*, T={templates.shape[0]}] to fit templates {list(templates.shape)}"
        reject(op, "coefficients", fitting, coefficients)


def flat(templates: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Templates as [T, N], in their order in memory, and what makes [*, N] of that order [*, *shape] again."""
    order, shape = _memory_order(templates), templates.shape[1:]
    columns = (templates if order is None else templates.permute(0, *order)).reshape(templates.shape[0], prod(shape))
    if order is None:
        return columns, lambda mixed: mixed.view(*mixed.shape[:-1], *shape)
    back = sorted(range(len(order)), key=order.__getitem__)

    def shaped(mixed: Tensor) -> Tensor:
        leading = mixed.dim() - 1
        mixed = mixed.view(*mixed.shape[:-1], *(templates.shape[axis] for axis in order))
        return mixed.permute(*range(leading), *(leading + axis for axis in back))

    return columns, shaped


def _memory_order(templates: Tensor) -> list[int] | None:
    """The axes of a template from the outermost in memory to the innermost; None where they are in order.

    Not under torch.compile, which would have to know the strides.
    """
    if torch.compiler.is_compiling() or templates[0].is_contiguous():
        return None
    order = sorted(range(1, templates.dim()), key=templates.stride, reverse=True)
    return order if order != sorted(order) else None
