"""Gradients that must be a graph of their own, for nodes whose kernels autograd cannot see through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch

from ._registration import is_plain_eager


def must_be_seen(grad: Tensor) -> bool:
    """Whether something has to see the operations of a backward pass on `grad`.

    autograd.grad(is_grads_batched=True) maps over ops, which cannot be done with lists of tensors.
    """
    return torch.is_grad_enabled() or not is_plain_eager(grad) or _functorch.is_legacy_batchedtensor(grad)


def differentiated(
    call: Callable[..., Tensor], tensors: Sequence[Tensor | None], need: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `call(*tensors)`, a composition of ops that have derivatives, where `need` has True."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one argument may be given twice or depend on another, and each has its own gradient.
        inputs = [None if t is None else t.view_as(t) for t in tensors]
        y = call(*inputs)
    wanted = [t for t, n in zip(inputs, need) if n and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, allow_unused=True) if wanted else ())
    return [next(grads) if n and t is not None else None for t, n in zip(inputs, need)]


def pullback(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    need: Sequence[bool],
    grad: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Gradients of `call(*tensors)` where `need` has True, in rules that torch.func's transforms may differentiate."""
    places = [n for n, needed in enumerate(need) if needed]

    def of_needed(*needed: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(places, needed))
        return call(*(given.get(n, t) for n, t in enumerate(tensors)))

    grads = iter(torch.func.vjp(of_needed, *(tensors[n] for n in places))[1](grad))
    return [next(grads) if needed else None for needed in need]
