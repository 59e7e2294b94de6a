"""Whole models: the ensembles of examples/forum_models.py, their input being data without a gradient.

All contestants map x [batch, ensemble, state] to [batch, ensemble, heads, actions] and start from the parameters of
the loop model; gradients are compared in the layout of the effens_kernels model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.forum_models import Ensemble1, Ensemble2, FastEnsemble1, FastEnsemble2, stacked

from ..workloads import FORUM_WORKLOADS, ForumWorkload
from .base import LOOP, OURS, Contestant, Problem, Product, Suite


def _sizes(workload: ForumWorkload) -> tuple[int, ...]:
    return workload.state, workload.hidden, workload.actions, workload.heads, workload.members


def _start(problem: Problem) -> tuple[Tensor, Ensemble1 | Ensemble2]:
    """The same x and the same loop model for every contestant."""
    workload, dtype, device = problem
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (Ensemble1 if workload.shared_trunk else Ensemble2)(*_sizes(workload))
        x = torch.randn(workload.batch, workload.members, workload.state)
    return x.to(device, dtype), model.to(device, dtype)


def _parameters(model: Ensemble1 | Ensemble2) -> dict[str, Tensor]:
    """Leaves under the names and in the shapes of the effens_kernels model."""
    return {name: value.clone().requires_grad_() for name, value in stacked(model).items()}


def _gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters.items()}


def loop(problem: Problem) -> Contestant:
    x, model = _start(problem)
    return Contestant(LOOP, model, (x,), list(model.parameters()), lambda: stacked(model, lambda p: p.grad))


def vmap(problem: Problem) -> Contestant:
    """Ensemble2: `functional_call` over stacked MLPs; Ensemble1: a nested `vmap` over the heads of every member."""
    x, model = _start(problem)
    if problem.workload.shared_trunk:
        heads = torch.func.vmap(torch.func.vmap(F.linear, (None, 0, 0), 1), (1, 0, 0), 1)
        parameters = _parameters(model)
        sizes = (problem.workload.heads, problem.workload.actions)

        def shared_trunk(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
            weight, bias = (p[f"members.layers.3.{name}"].unflatten(1, sizes) for name in ("weight", "bias"))
            return heads(_trunk(x, p), weight, bias)

        return Contestant(
            "vmap", shared_trunk, (x, parameters), list(parameters.values()), lambda: _gradients(parameters)
        )

    members = list(model.ensemble)
    state, _ = torch.func.stack_module_state(members)
    skeleton = members[0]

    def one(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, p, (x,)).transpose(0, 1)

    def gradients() -> dict[str, Tensor]:
        for e, member in enumerate(members):
            for name, parameter in member.named_parameters():
                parameter.grad = state[name].grad[e]
        return stacked(model, lambda p: p.grad)

    return Contestant("vmap", torch.func.vmap(one, (0, 1), 1), (state, x), list(state.values()), gradients)


def baddbmm(problem: Problem) -> Contestant:
    """What a careful user writes by hand: one product per layer for all members, the heads side by side."""
    x, model = _start(problem)
    parameters = _parameters(model)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    def shared_trunk(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        features = _trunk(x, p).transpose(0, 1)
        return linear(features, p["members.layers.3.weight"], p["members.layers.3.bias"])

    def members(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        x = x.transpose(0, 1)
        for n in range(3):
            x = torch.relu(linear(x, p[f"members.layers.{n}.weight"], p[f"members.layers.{n}.bias"]))
        return linear(x, p["members.layers.3.weight"], p["members.layers.3.bias"])

    body = shared_trunk if problem.workload.shared_trunk else members
    heads = (problem.workload.heads, problem.workload.actions)

    def function(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return body(x, p).transpose(0, 1).unflatten(-1, heads)

    return Contestant("baddbmm", function, (x, parameters), list(parameters.values()), lambda: _gradients(parameters))


def _trunk(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    for n in range(3):
        x = torch.relu(F.linear(x, p[f"members.layers.{n}.weight"][0], p[f"members.layers.{n}.bias"][0]))
    return x


def ours(problem: Problem) -> list[Contestant]:
    x, loop_model = _start(problem)
    model: nn.Module = (FastEnsemble1 if problem.workload.shared_trunk else FastEnsemble2)(*_sizes(problem.workload))
    model.to(problem.device, problem.dtype).load_state_dict(stacked(loop_model))
    parameters = dict(model.named_parameters())
    return [Contestant(OURS, model, (x,), list(parameters.values()), lambda: _gradients(parameters), kind="ours")]


def products(workload: ForumWorkload) -> list[Product]:
    rows = workload.members * workload.batch
    return [Product(rows, inputs, outputs, n > 0) for n, (inputs, outputs) in enumerate(workload.layers())]


SUITE = Suite(
    name="forum",
    title="Forum models: forward and backward of whole ensembles",
    workloads=FORUM_WORKLOADS,
    peers={LOOP: loop, "vmap": vmap, "baddbmm": baddbmm},
    ours=ours,
    products=products,
)
