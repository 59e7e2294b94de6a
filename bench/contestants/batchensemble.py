"""BatchEnsemble models and layers: `rank1_mlp` and `rank1_linear` against what tutorials and libraries do.

Models take data, [B, I] without a gradient, the same for all members; layers take features of a layer before, [E, B, I]
with one.  Every contestant gives [E, B, O] and has a bias for each member.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels import rank1_linear, rank1_mlp

from ..workloads import BATCHENSEMBLE_WORKLOADS, BatchEnsembleWorkload
from .base import LOOP, OURS, Contestant, NotApplicableError, Problem, Product, Suite

MORE_WORKLOADS = (
    BatchEnsembleWorkload(4, 128, (64, 64), model=False),
    BatchEnsembleWorkload(32, 256, (256, 10), model=False),
    BatchEnsembleWorkload(4, 1024, (1024, 1024), model=False),
    BatchEnsembleWorkload(8, 16, (512, 512), model=False),
    BatchEnsembleWorkload(16, 1000, (123, 77), model=False),
)
NAMES = ("weight", "r", "s", "bias")

Layers = list[tuple[Tensor, Tensor, Tensor, Tensor]]  # (weight, r, s, bias) of each


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, Layers]:
    x, layers = problem.workload.inputs_for(problem.dtype, problem.device, seed=0)
    return x, layers


def _start(problem: Problem) -> tuple[Tensor, Layers]:
    """The same values for every contestant, as leaves of its own."""
    x, layers = _values(problem)
    x = x.clone().requires_grad_(not problem.workload.model)
    return x, [tuple(t.clone().requires_grad_() for t in layer) for layer in layers]


def _contestant(name: str, problem: Problem, layer: Callable[..., Tensor], **labels: str) -> Contestant:
    """`layer(x, weight, r, s, bias, relu)` once for each layer, relu between them."""
    x, layers = _start(problem)

    def function(x: Tensor, layers: Layers) -> Tensor:
        for n, parameters in enumerate(layers):
            x = layer(x, *parameters, n + 1 < len(layers))
        return x

    return Contestant(name, function, (x, layers), _leaves(x, layers), lambda: _gradients(x, layers), **labels)


def from_function(problem: Problem, name: str, function: Callable[..., Tensor], **labels: str) -> Contestant:
    """function(x, weight, r, s, bias) on the values of a workload of one layer."""
    return _contestant(name, problem, lambda *values: function(*values[:-1]), **labels)


def _leaves(x: Tensor, layers: Layers) -> list[Tensor]:
    return [x] * x.requires_grad + [t for layer in layers for t in layer]


def _gradients(x: Tensor, layers: Layers) -> dict[str, Tensor]:
    found = {"x": x.grad} if x.requires_grad else {}
    return found | {f"{name} {n}": t.grad for n, layer in enumerate(layers) for name, t in zip(NAMES, layer)}


def loop(problem: Problem) -> Contestant:
    """One member after the other through the shared layers."""
    x, layers = _start(problem)

    def function(x: Tensor, layers: Layers) -> Tensor:
        members = []
        for e in range(problem.workload.members):
            h = x if x.dim() == 2 else x[e]
            for n, (weight, r, s, bias) in enumerate(layers):
                h = F.linear(h * r[e], weight) * s[e] + bias[e]
                h = torch.relu(h) if n + 1 < len(layers) else h
            members.append(h)
        return torch.stack(members)

    return Contestant(LOOP, function, (x, layers), _leaves(x, layers), lambda: _gradients(x, layers))


def broadcast(problem: Problem) -> Contestant:
    """The tutorials' layer: expand, scale, matmul, scale, add."""

    def layer(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor, relu: bool) -> Tensor:
        if x.dim() == 2:
            x = x.unsqueeze(0).expand(len(r), -1, -1)
        y = torch.matmul(x * r.unsqueeze(1), weight.t()) * s.unsqueeze(1) + bias.unsqueeze(1)
        return torch.relu(y) if relu else y

    return _contestant("broadcast", problem, layer)


def fold(problem: Problem) -> Contestant:
    """Weights of each member written out, then one batched product."""

    def layer(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor, relu: bool) -> Tensor:
        folded = weight * (s.unsqueeze(2) * r.unsqueeze(1))
        x = x.expand(len(r), *x.shape) if x.dim() == 2 else x
        y = torch.baddbmm(bias.unsqueeze(1), x, folded.mT)
        return torch.relu(y) if relu else y

    return _contestant("fold + bmm", problem, layer)


def tabm(problem: Problem) -> Contestant:
    """The layers of the package tabm, in its layout [B, E, I]."""
    try:
        from tabm import LinearBatchEnsemble
    except ImportError as error:
        raise NotApplicableError("the package tabm is not installed") from error
    x, layers = _start(problem)
    modules = []
    for parameters in layers:
        outputs, inputs = parameters[0].shape
        module = LinearBatchEnsemble(inputs, outputs, k=problem.workload.members, scaling_init="ones")
        for name, value in zip(NAMES, parameters):
            setattr(module, name, torch.nn.Parameter(value.detach()))
        modules.append(module)
    leaves = [tuple(getattr(module, name) for name in NAMES) for module in modules]

    def function(x: Tensor) -> Tensor:
        h = x.unsqueeze(1).expand(-1, problem.workload.members, -1) if x.dim() == 2 else x.transpose(0, 1)
        for n, module in enumerate(modules):
            h = torch.relu(module(h)) if n + 1 < len(modules) else module(h)
        return h.transpose(0, 1)

    return Contestant("tabm", function, (x,), _leaves(x, leaves), lambda: _gradients(x, leaves))


def ours(problem: Problem) -> list[Contestant]:
    """Models as one op, and a layer alone as its own."""
    if not problem.workload.model:
        return [from_function(problem, OURS, rank1_linear, kind="ours")]
    x, layers = _start(problem)

    def function(x: Tensor, layers: Layers) -> Tensor:
        return rank1_mlp(x, *map(list, zip(*layers)))

    return [Contestant(OURS, function, (x, layers), _leaves(x, layers), lambda: _gradients(x, layers), kind="ours")]


def products(workload: BatchEnsembleWorkload) -> list[Product]:
    rows = workload.members * workload.batch
    pairs = zip(workload.widths, workload.widths[1:])
    return [Product(rows, inputs, outputs, n > 0 or not workload.model) for n, (inputs, outputs) in enumerate(pairs)]


SUITE = Suite(
    name="batchensemble",
    title="BatchEnsemble: models and layers of rank1_linear",
    workloads=BATCHENSEMBLE_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, "broadcast": broadcast, "fold + bmm": fold, "tabm": tabm},
    ours=ours,
    products=products,
)
