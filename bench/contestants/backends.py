"""Ours, once for every backend that runs a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import effens_kernels
from effens_kernels import _dispatch

from .base import OURS, Contestant, Problem


def every_backend(
    op: str,
    problem: Problem,
    sizes: tuple[int, ...],
    from_function: Callable[..., Contestant],
    options: Mapping[str, Any],
) -> list[Contestant]:
    """The backend that dispatch chooses comes first and stands for the package.

    `from_function(problem, name, function, **labels)` makes a contestant of a function of the op's tensors; `sizes` are
    what the choice may depend on (E, B, I, O), `options` what the op is called with besides.
    """
    question = _dispatch.Problem(op, problem.device, problem.dtype, sizes)
    chosen = _dispatch.select(question)
    found = []
    for backend in sorted(_dispatch.BACKENDS, key=lambda backend: backend != chosen):
        if _dispatch.why_not(backend, question) is not None:
            continue
        name, kind = (OURS, "ours") if backend == chosen else (f"{OURS} ({backend})", "backend")
        requested = None if backend == chosen else backend  # what users write pays for the choice as well
        function = on_backend(op, requested, options)
        found.append(from_function(problem, name, function, kind=kind, note=f"backend {backend}"))
    return found


def on_backend(op: str, backend: str | None, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The public op as a function of its tensors alone."""
    public = getattr(effens_kernels, op)

    def function(*tensors: Tensor) -> Tensor:
        return public(*tensors, **options, backend=backend)

    return function
