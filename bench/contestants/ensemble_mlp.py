"""Whole perceptrons: `ensemble_mlp` against a loop, vmap and a chain of products.

x are rows of data that all members see, so they need no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels.ops._activations import ACTIVATIONS

from .backends import every_backend
from .base import LOOP, Contestant, Problem, Product, Suite

CHAIN = "baddbmm chain"


@dataclass(frozen=True)
class MLPWorkload:
    """`widths`: I, hidden, O; `shared_layers`: those with weights [1, O, I]."""

    members: int
    batch: int
    widths: tuple[int, ...]
    activation: str | None = "relu"
    out_activation: str | None = None
    shared: bool = True
    shared_layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        layers = "-".join(map(str, self.widths))
        parts = [f"E{self.members}", f"B{self.batch}", layers, str(self.activation)]
        parts += [f"out_{self.out_activation}"] * bool(self.out_activation) + ["shared"] * self.shared
        parts += ["layers" + "".join(map(str, self.shared_layers)) + "_shared"] * bool(self.shared_layers)
        return "-".join(parts)

    def inputs_for(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(x, weights, biases), scaled so that every layer's outputs are of order 1."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        x = normal(*(() if self.shared else (self.members,)), self.batch, self.widths[0])
        weights, biases = [], []
        for n, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:])):
            copies = 1 if n in self.shared_layers else self.members
            weights.append((normal(copies, outputs, inputs) * (2 / inputs) ** 0.5).to(device, dtype))
            biases.append(normal(copies, outputs).to(device, dtype))
        return x.to(device, dtype), weights, biases


def _inputs(problem: Problem) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same for every contestant, on leaves of its own."""
    x, weights, biases = _values(problem)
    return x, [w.clone().requires_grad_() for w in weights], [b.clone().requires_grad_() for b in biases]


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def _by_name(weights: list[Tensor], biases: list[Tensor]) -> dict[str, Tensor]:
    return {
        f"{kind}[{n}]": t for kind, tensors in (("weights", weights), ("biases", biases)) for n, t in enumerate(tensors)
    }


def _layers(problem: Problem, linear: Callable[..., Tensor], x: Tensor, weights, biases) -> Tensor:
    case = problem.workload
    between, after = ACTIVATIONS[case.activation].apply, ACTIVATIONS[case.out_activation].apply
    for n, (weight, bias) in enumerate(zip(weights, biases)):
        x = (after if n + 1 == len(weights) else between)(linear(x, weight, bias))
    return x


def from_function(problem: Problem, name: str, function: Callable[..., Tensor], **labels: str) -> Contestant:
    """function(x, weights, biases) on the problem's values."""
    x, weights, biases = _inputs(problem)

    def gradients() -> dict[str, Tensor]:
        return {name: t.grad for name, t in _by_name(weights, biases).items()}

    return Contestant(name, function, (x, weights, biases), [*weights, *biases], gradients, **labels)


def loop(problem: Problem) -> Contestant:
    """As with a list of `nn.Sequential`: parameters of each member are tensors of their own."""
    x, weights, biases = _values(problem)

    def apart(tensors: list[Tensor]) -> list[list[Tensor]]:
        return [[t[e].clone().requires_grad_() for t in tensors] for e in range(problem.workload.members)]

    members = list(zip(apart(weights), apart(biases)))

    def function(x: Tensor, members: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
        return torch.stack([_layers(problem, F.linear, x, *member) for member in members])

    def gradients() -> dict[str, Tensor]:
        found = ([torch.stack([m[kind][n].grad for m in members]) for n in range(len(weights))] for kind in (0, 1))
        return _by_name(*found)

    leaves = [t for member in members for kind in member for t in kind]
    return Contestant(LOOP, function, (x, members), leaves, gradients)


def vmap(problem: Problem) -> Contestant:
    def one(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return _layers(problem, F.linear, x, weights, biases)

    return from_function(problem, "vmap", torch.func.vmap(one, in_dims=(None, 0, 0)))


def chain(problem: Problem) -> Contestant:
    """What a careful user writes by hand: one product per layer for all members."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    def function(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return _layers(problem, linear, x.expand(len(weights[0]), *x.shape), weights, biases)

    return from_function(problem, CHAIN, function)


def options(case: MLPWorkload) -> dict[str, str | None]:
    return {"activation": case.activation, "out_activation": case.out_activation}


def ours(problem: Problem) -> list[Contestant]:
    return every_backend("ensemble_mlp", problem, (), from_function, options(problem.workload))


def products(case: MLPWorkload) -> list[Product]:
    rows, sizes = case.members * case.batch, zip(case.widths, case.widths[1:])
    return [Product(rows, inputs, outputs, n > 0) for n, (inputs, outputs) in enumerate(sizes)]


SUITE = Suite(
    name="mlp",
    title="Whole perceptrons: ensemble_mlp",
    workloads=(MLPWorkload(10, 256, (8, 64, 64, 64, 20)),),
    peers={LOOP: loop, "vmap": vmap, CHAIN: chain},
    ours=ours,
    products=products,
)
