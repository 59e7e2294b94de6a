"""Layer Ensembles: sets of paths through a network with options, against paths one by one, Algorithm 1 and vmap.

x are rows of data that all paths see, so they need no gradient.  The limit has one plain product for each layer, of the
rows of all its prefixes; that of a convolution has a row for each pixel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from effens_kernels.nn import LayerEnsemble
from examples.layer_ensemble_models import cnn, mlp

from .base import LOOP, OURS, Contestant, Problem, Product, Suite

RECURSION = "Algorithm 1"


@dataclass(frozen=True)
class PathsWorkload:
    """`widths` of a perceptron with one hidden width, None for the CNN; `paths` drawn at random, None for all."""

    options: int
    batch: int
    widths: tuple[int, int, int] | None = None
    paths: int | None = None

    def __str__(self) -> str:
        network = "cnn" if self.widths is None else "-".join(map(str, (*self.widths[:2], *self.widths[1:])))
        return f"K{self.options}-B{self.batch}-{network}-{'all' if self.paths is None else self.paths}"

    def network(self) -> nn.Sequential:
        return cnn() if self.widths is None else mlp(*self.widths)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, 1, 8, 8) if self.widths is None else (self.batch, self.widths[0])


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[LayerEnsemble, Tensor, Tensor]:
    """The model, x and the paths: the same for every contestant."""
    workload, dtype, device = problem
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LayerEnsemble.from_model(workload.network(), workload.options)
        x = torch.randn(workload.input_shape)
        paths = model.all_paths() if workload.paths is None else model.sample(workload.paths)
    return model.to(device, dtype), x.to(device, dtype), paths


def _modules(model: LayerEnsemble) -> list[list[nn.Module]]:
    return [[layer.plain(k) for k in range(layer.num_options)] for layer in model.layers]


def _from_modules(
    name: str, problem: Problem, function: Callable[[Tensor, list[list[nn.Module]]], Tensor]
) -> Contestant:
    model, x, _ = _values(problem)
    options = _modules(model)

    def gradients() -> dict[str, Tensor]:
        of_layers = [[list(option.parameters()) for option in layer] for layer in options]
        return {
            f"{kind} of layer {q}": torch.stack([_gradient(parameters[n]) for parameters in layer])
            for q, layer in enumerate(of_layers)
            for n, kind in enumerate(("weight", "bias"))
        }

    leaves = [p for layer in options for option in layer for p in option.parameters()]
    return Contestant(name, function, (x, options), leaves, gradients)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zero for an option that no path takes."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def loop(problem: Problem) -> Contestant:
    paths = _values(problem)[2].tolist()

    def function(x: Tensor, options: list[list[nn.Module]]) -> Tensor:
        results = []
        for path in paths:
            y = x
            for layer, k in zip(options, path):
                y = layer[k](y)
            results.append(y)
        return torch.stack(results)

    return _from_modules(LOOP, problem, function)


def recursion(problem: Problem) -> Contestant:
    """The paper's way to compute each prefix once: sorted paths, one call for each prefix."""
    paths = _values(problem)[2]
    order = sorted(range(len(paths)), key=lambda n: paths[n].tolist())
    in_order, back = paths[order].tolist(), torch.tensor(order).argsort()

    def run(options: list[list[nn.Module]], paths: list[list[int]], layer: int, x: Tensor) -> list[Tensor]:
        if layer == len(options):
            return [x] * len(paths)
        results: list[Tensor] = []
        begin = 0
        for end in range(1, len(paths) + 1):
            if end == len(paths) or paths[end][layer] != paths[begin][layer]:
                y = options[layer][paths[begin][layer]](x)
                results += run(options, paths[begin:end], layer + 1, y)
                begin = end
        return results

    def function(x: Tensor, options: list[list[nn.Module]]) -> Tensor:
        return torch.stack(run(options, in_order, 0, x))[back.to(x.device)]

    return _from_modules(RECURSION, problem, function)


def _by_kind(model: LayerEnsemble) -> dict[str, nn.Parameter]:
    """Parameters [K, ...], a weight and a bias for each layer."""
    return {
        f"{kind} of layer {q}": getattr(next(stage for stage in layer if hasattr(stage, "weight")), kind)
        for q, layer in enumerate(model.layers)
        for kind in ("weight", "bias")
    }


def vmap(problem: Problem) -> Contestant:
    """Parameters gathered for each path, then one network for all."""
    model, x, paths = _values(problem)
    plain, of_layer = model.path([0] * len(model.layers)).to("meta"), paths.t().to(x.device)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in _by_kind(model).items()}
    names = [name for name, _ in plain.named_parameters()]  # a weight and a bias for each layer, in order

    def function(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        gathered = {name: p[of_layer[n // 2]] for n, (name, p) in enumerate(zip(names, leaves.values()))}
        return torch.func.vmap(lambda p: torch.func.functional_call(plain, p, (x,)))(gathered)

    return Contestant(
        "vmap", function, (x, leaves), list(leaves.values()), lambda: {name: p.grad for name, p in leaves.items()}
    )


def ours(problem: Problem) -> list[Contestant]:
    model, x, paths = _values(problem)
    model = copy.deepcopy(model)
    leaves = _by_kind(model)
    return [
        Contestant(
            OURS, model, (x, paths), list(leaves.values()), lambda: {n: p.grad for n, p in leaves.items()}, kind="ours"
        )
    ]


def products(workload: PathsWorkload) -> list[Product]:
    model, _, paths = _values(Problem(workload, torch.float32, "cpu"))
    found = []
    pixels = 8 * 8
    for q, (layer, prefixes) in enumerate(zip(model.layers, model.tree(paths).num_prefixes)):
        weight = next(stage.weight for stage in layer if hasattr(stage, "weight"))
        rows = prefixes * workload.batch * (pixels if weight.dim() > 3 else 1)
        found.append(Product(rows, weight[0, 0].numel(), weight.shape[1], q > 0))
    return found


SUITE = Suite(
    name="layer_ensemble",
    title="Layer Ensembles: sets of paths",
    workloads=(
        PathsWorkload(6, 16),  # the paper's largest: a CNN of four layers, all 1296 paths
        PathsWorkload(3, 16),
        PathsWorkload(6, 16, paths=100),
        PathsWorkload(5, 100, (10, 50, 1)),  # the paper's testbed: 125 paths
        PathsWorkload(6, 64, (64, 256, 10)),
    ),
    more_workloads=(
        *(PathsWorkload(options, 16) for options in (1, 2, 4, 5)),
        PathsWorkload(5, 100, (10, 50, 1), paths=36),
        PathsWorkload(30, 100, (10, 50, 1), paths=30),
    ),
    peers={LOOP: loop, RECURSION: recursion, "vmap": vmap},
    ours=ours,
    products=products,
    compiles=False,
)
