"""One table row of a bench part: every contestant for one layer, issued by the host and as CUDA graphs."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ..contestants import Contestant, NotApplicableError, Problem
from ..contestants.backends import every_backend
from ..contestants.base import COMPILE, COMPILE_MAX, copy_limit
from ..graphs import SUFFIX, graphed
from ..results import Entry, Row
from ..runner import Lineup, fastest_first
from ..timing import measure
from .cold import evict_l2, release_memory
from .context import Context
from .counts import host_seconds, launches
from .families import Column, Family
from .precision import TOLERANCE, precision

SECONDS = {"cuda": 6.0, "cpu": 0.05}  # of timing, divided among the contestants
ROUNDS = {"cuda": 7, "cpu": 1}
AUTOTUNE_SECONDS = 60.0  # that torch.compile may take to try its choices for one row
MODES = ("eager", "graphed")


def run_layer(
    family: Family, column: Column, workload: Any, name: str, context: Context, reserved: float
) -> dict[str, Any]:
    """{"eager": Row, "graphed": Row, "bytes": ..., "counts": ...}; `reserved`: seconds for what comes after."""
    release_memory()
    with precision(name) as dtype:
        return _run_layer(family, column, Problem(workload, dtype, context.device), name, context, reserved)


def _run_layer(
    family: Family, column: Column, problem: Problem, name: str, context: Context, reserved: float
) -> dict[str, Any]:
    workload, device = problem.workload, problem.device
    lineup = Lineup(TOLERANCE.get(name))
    torch.compiler.reset()  # what was compiled for other shapes makes torch.compile generalize
    for peer, build in family.suite.peers.items():
        lineup.admit(peer, lambda build=build: build(problem))
    _admit_compiled(lineup, context, reserved)
    options = family.options(workload)
    backends = every_backend(family.op, problem, family.sizes(workload), family.from_function, options)
    for ours in (*backends, *family.variants(problem)):
        lineup.admit(ours.name, lambda ours=ours: ours, ours.kind)
    for limit in _limits(family, column, problem):
        lineup.add(limit)
    for contestant in list(lineup.runnable):
        if contestant.kind in ("limit", "bound"):
            _add_graph(lineup, contestant, device)
        else:
            lineup.admit(contestant.name + SUFFIX, lambda c=contestant: graphed(c, device), contestant.kind)
    counted = [c for c in lineup.runnable if not c.name.endswith(SUFFIX) and c.kind != "limit"]
    counts = {c.name: {"launches": launches(c, device), "host": host_seconds(c, device)} for c in counted}
    timings = measure(
        lineup.runnable, SECONDS[device], device, ROUNDS[device], before=evict_l2(device if column.cold else "cpu")
    )
    row = Row(f"{family.name}-{column.name}", str(workload), name, 0, *family.suite.flops(workload))
    entries = lineup.timed(timings)
    return {
        **{mode: asdict(replace(row, suite=f"{row.suite}-{mode}", entries=_of(mode, entries))) for mode in MODES},
        "case": asdict(workload),
        "bytes": family.moved_bytes(workload, problem.dtype),
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


def _limits(family: Family, column: Column, problem: Problem) -> list[Contestant]:
    if column.limit == "copy":
        limit = copy_limit(*family.moved_bytes(problem.workload, problem.dtype), problem.device)
    else:
        limit = family.suite.limit(problem)
    return [*family.bounds(problem), limit]


def _add_graph(lineup: Lineup, contestant: Contestant, device: str) -> None:
    try:
        lineup.add(graphed(contestant, device))
    except (NotApplicableError, RuntimeError) as error:
        lineup.refuse(contestant.name + SUFFIX, contestant.kind, str(error).splitlines()[0])


def _of(mode: str, entries: list[Entry]) -> list[Entry]:
    """The entries of one mode, under the names that they share."""
    graphs = mode == "graphed"
    return [replace(e, name=e.name.removesuffix(SUFFIX)) for e in entries if e.name.endswith(SUFFIX) == graphs]


def describe(workload: Any, name: str) -> str:
    return f"{workload}, {name}"
