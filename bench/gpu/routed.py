"""mixture_linear by a route of choice, which the public op leaves to dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from effens_kernels import _dispatch

from ..contestants import Contestant, Problem, mixture_linear
from ..contestants.backends import on_backend
from ..contestants.base import OURS

ROUTES = ("weights", "outputs")


class _Taking:
    """Inside, dispatch names this route."""

    def __init__(self, route: str) -> None:
        self.answer = lambda *_: route

    def __enter__(self) -> None:
        self.rule, _dispatch.mixture_route = _dispatch.mixture_route, self.answer

    def __exit__(self, *error: object) -> None:
        _dispatch.mixture_route = self.rule


def every_route(problem: Problem) -> list[Contestant]:
    """On each backend that has kernels here."""
    question = _dispatch.Problem("mixture_linear", problem.device, problem.dtype)
    backends = [backend for backend in _dispatch.BACKENDS if backend != "reference"]
    backends = [backend for backend in backends if _dispatch.why_not(backend, question) is None]
    return [_routed(problem, backend, route) for backend in backends for route in ROUTES]


def name_of(backend: str, route: str) -> str:
    return f"{OURS} ({backend}, {route})"


def _routed(problem: Problem, backend: str, route: str) -> Contestant:
    op, taking = on_backend("mixture_linear", backend, {}), _Taking(route)

    def function(*tensors: Tensor) -> Tensor:
        with taking:
            return op(*tensors)

    def backward(output: Tensor, gradient: Tensor) -> None:
        with taking:  # which is asked again
            torch.autograd.backward(output, gradient)

    labels = {"kind": "backend", "note": f"backend {backend}, {route} mixed", "backward": backward}
    return mixture_linear.from_function(problem, name_of(backend, route), function, **labels)
