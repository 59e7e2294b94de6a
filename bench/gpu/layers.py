"""One table row of a bench part: every contestant for one layer, issued by the host and as CUDA graphs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from effens_kernels.testing import LinearCase

from ..contestants import Contestant, NotApplicableError, Problem, Suite
from ..contestants import grouped_linear as stacked
from ..contestants.base import COMPILE, COMPILE_MAX, copy_limit, limit_per_member
from ..graphs import SUFFIX, graphed
from ..results import Entry, Row
from ..runner import Lineup, fastest_first
from ..timing import measure
from .cold import evict_l2, release_memory
from .columns import Column, moved_bytes
from .context import Context
from .counts import host_seconds, launches
from .precision import TOLERANCE, precision

SECONDS = {"cuda": 6.0, "cpu": 0.05}  # of timing, divided among the contestants
ROUNDS = {"cuda": 7, "cpu": 1}
AUTOTUNE_SECONDS = 60.0  # that torch.compile may take to try its choices for one row
MODES = ("eager", "graphed")


def suite(column: Column) -> Suite:
    peers = {**stacked.SUITE.peers, "bmm + bias": bmm_then_bias}
    return replace(stacked.SUITE, name=f"stacked-{column.name}", title=column.title, peers=peers)


def bmm_then_bias(problem: Problem) -> Contestant:
    """Bias and activation out of place, after the product: a kernel each."""
    activation = stacked.ACTIVATIONS[problem.workload.activation].apply

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.expand(len(weight), *x.shape) if x.dim() == 2 else x
        return activation(torch.bmm(rows, weight.mT) + bias.unsqueeze(1))

    return stacked.from_function(problem, "bmm + bias", function)


def run_layer(column: Column, case: LinearCase, name: str, context: Context, reserved: float) -> dict[str, Any]:
    """{"eager": Row, "graphed": Row, "bytes": ..., "counts": ...}; `reserved`: seconds for what comes after."""
    release_memory()
    with precision(name) as dtype:
        return _run_layer(column, suite(column), Problem(case, dtype, context.device), name, context, reserved)


def _run_layer(
    column: Column, about: Suite, problem: Problem, name: str, context: Context, reserved: float
) -> dict[str, Any]:
    case, device = problem.workload, problem.device
    lineup = Lineup(TOLERANCE.get(name))
    torch.compiler.reset()  # what was compiled for other shapes makes torch.compile generalize
    for peer, build in about.peers.items():
        lineup.admit(peer, lambda build=build: build(problem))
    _admit_compiled(lineup, context, reserved)
    for ours in about.ours(problem):
        lineup.admit(ours.name, lambda ours=ours: ours, ours.kind)
    for limit in _limits(column, about, problem):
        lineup.add(limit)
    for contestant in list(lineup.runnable):
        if contestant.kind in ("limit", "bound"):
            _add_graph(lineup, contestant, device)
        else:
            lineup.admit(contestant.name + SUFFIX, lambda c=contestant: graphed(c, device), contestant.kind)
    counted = [c for c in lineup.runnable if not c.name.endswith(SUFFIX) and c.kind in ("ours", "backend", "peer")]
    counts = {c.name: {"launches": launches(c, device), "host": host_seconds(c, device)} for c in counted}
    timings = measure(
        lineup.runnable, SECONDS[device], device, ROUNDS[device], before=evict_l2(device if column.cold else "cpu")
    )
    row = Row(about.name, str(case), name, 0, *about.flops(case))
    entries = lineup.timed(timings)
    return {
        **{mode: asdict(replace(row, suite=f"{about.name}-{mode}", entries=_of(mode, entries))) for mode in MODES},
        "case": asdict(case),
        "bytes": moved_bytes(case, problem.dtype),
        "counts": counts,
    }


def _admit_compiled(lineup: Lineup, context: Context, reserved: float) -> None:
    """torch.compile of the fastest eager peer that compiles, and of the same with more choices tried."""
    if not context.compile:
        lineup.refuse(COMPILE, "peer", "left out by request")
        return
    backend = {"backend": "aot_eager"} if context.rehearsal else {}
    compiled = None
    for best in fastest_first(lineup.runnable, context.device):
        compiled = lineup.admit(COMPILE, lambda best=best: best.compiled(**backend))
        if compiled:
            break
    if compiled is None or context.rehearsal:
        lineup.refuse(COMPILE_MAX, "peer", "needs a GPU" if context.rehearsal else lineup.entries[COMPILE].reason)
    elif context.left() < AUTOTUNE_SECONDS + reserved:
        lineup.refuse(COMPILE_MAX, "peer", "not tried: too little of the part's time was left")
    else:
        options = {"mode": "max-autotune-no-cudagraphs"}
        lineup.admit(COMPILE_MAX, lambda: best.compiled(COMPILE_MAX, **options))


def _limits(column: Column, about: Suite, problem: Problem) -> list[Contestant]:
    case, dtype, device = problem
    per_member = limit_per_member(about.products(case), case.members, dtype, device)
    if column.limit == "copy":
        return [per_member, copy_limit(*moved_bytes(case, dtype), device)]
    return [per_member, about.limit(problem)]


def _add_graph(lineup: Lineup, contestant: Contestant, device: str) -> None:
    try:
        lineup.add(graphed(contestant, device))
    except (NotApplicableError, RuntimeError) as error:
        lineup.refuse(contestant.name + SUFFIX, contestant.kind, str(error).splitlines()[0])


def _of(mode: str, entries: list[Entry]) -> list[Entry]:
    """The entries of one mode, under the names that they share."""
    graphs = mode == "graphed"
    return [replace(e, name=e.name.removesuffix(SUFFIX)) for e in entries if e.name.endswith(SUFFIX) == graphs]


def describe(case: LinearCase, name: str) -> str:
    return f"{case}, {name}"
