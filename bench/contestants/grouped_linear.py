"""One layer: `grouped_linear` against a loop, vmap, baddbmm and grouped_mm.

Per-member inputs are the features of a layer before, so they need a gradient; shared inputs are data and need none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import LinearCase

from ..workloads import LAYER_WORKLOADS
from .backends import every_backend
from .base import LOOP, Contestant, NotApplicableError, Problem, Product, Suite

MORE_WORKLOADS = (
    LinearCase(10, 256, 8, 64, activation="relu"),
    LinearCase(10, 256, 64, 20),
    LinearCase(100, 32, 64, 64, activation="relu"),
    LinearCase(50, 1, 256, 256),
    LinearCase(5, 128, 3072, 128, shared=True, activation="relu"),
    LinearCase(32, 256, 64, 256, shared=True, activation="relu"),
    LinearCase(10, 200, 123, 77, activation="relu"),
    LinearCase(10, 256, 256, 256, activation="gelu"),
    LinearCase(2, 4096, 256, 256),
    LinearCase(16, 64, 512, 512, activation="relu"),
)


def _inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The same (x, weight, bias) for every contestant, and the activation."""
    case = problem.workload
    x, weight, bias = (t.clone() for t in _values(problem))
    x.requires_grad_(not case.shared)
    return x, weight.requires_grad_(), bias.requires_grad_(), ACTIVATIONS[case.activation].apply


@lru_cache(maxsize=1)  # large ones take longer to draw than to use
def _values(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def _contestant(
    name: str, function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, **labels: str
) -> Contestant:
    named = {"x": x, "weight": weight, "bias": bias}
    leaves = {name: t for name, t in named.items() if t.requires_grad}
    return Contestant(
        name,
        function,
        (x, weight, bias),
        list(leaves.values()),
        lambda: {name: leaf.grad for name, leaf in leaves.items()},
        **labels,
    )


def from_function(problem: Problem, name: str, function: Callable[..., Tensor], **labels: str) -> Contestant:
    """function(x, weight, bias) on the problem's values."""
    return _contestant(name, function, *_inputs(problem)[:3], **labels)


def separate(problem: Problem, name: str, function: Callable[..., Tensor]) -> Contestant:
    """function(x, weights, biases), as with a list of `nn.Linear`: parameters of each member are tensors of their own.

    One that the function leaves out has no gradient, which counts as zero.
    """
    x, weight, bias, _ = _inputs(problem)
    weights, biases = ([t.detach().clone().requires_grad_() for t in stacked] for stacked in (weight, bias))

    def stacked(leaves: list[Tensor]) -> Tensor:
        return torch.stack([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])

    def gradients() -> dict[str, Tensor]:
        found = {"x": x.grad} if x.requires_grad else {}
        return found | {"weight": stacked(weights), "bias": stacked(biases)}

    return Contestant(name, function, (x, weights, biases), [x, *weights, *biases], gradients)


def loop(problem: Problem) -> Contestant:
    activation = ACTIVATIONS[problem.workload.activation].apply

    def function(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        rows = [x] * len(weights) if x.dim() == 2 else x.unbind()
        return torch.stack([activation(F.linear(*member)) for member in zip(rows, weights, biases, strict=True)])

    return separate(problem, LOOP, function)


def vmap(problem: Problem) -> Contestant:
    x, weight, bias, activation = _inputs(problem)
    linear = torch.func.vmap(F.linear, in_dims=(None if x.dim() == 2 else 0, 0, 0))
    return _contestant("vmap", lambda *tensors: activation(linear(*tensors)), x, weight, bias)


def baddbmm(problem: Problem) -> Contestant:
    x, weight, bias, activation = _inputs(problem)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.expand(len(weight), *x.shape) if x.dim() == 2 else x
        return activation(torch.baddbmm(bias.unsqueeze(1), rows, weight.mT))

    return _contestant("baddbmm", function, x, weight, bias)


def grouped_mm(problem: Problem) -> Contestant:
    if not hasattr(F, "grouped_mm"):
        raise NotApplicableError(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    x, weight, bias, activation = _inputs(problem)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # grouped_mm takes neither a bias nor shared rows
        rows = x.expand(len(weight), *x.shape).contiguous() if x.dim() == 2 else x
        return activation(F.grouped_mm(rows, weight.mT) + bias.unsqueeze(1))

    return _contestant("grouped_mm", function, x, weight, bias)


def ours(problem: Problem) -> list[Contestant]:
    case = problem.workload
    return every_backend("grouped_linear", problem, sizes(case), from_function, {"activation": case.activation})


def sizes(case: LinearCase) -> tuple[int, int, int, int]:
    return case.members, case.batch, case.inputs, case.outputs


def products(case: LinearCase) -> list[Product]:
    return [Product(case.members * case.batch, case.inputs, case.outputs, not case.shared)]


SUITE = Suite(
    name="layers",
    title="Layers: grouped_linear",
    workloads=LAYER_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, "vmap": vmap, "baddbmm": baddbmm, "grouped_mm": grouped_mm},
    ours=ours,
    products=products,
)
