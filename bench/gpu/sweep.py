"""Which backend and which tile of the CUDA kernels are fastest, by bucket of shapes: what makes a dispatch table.

A bucket is members, batch, inputs and outputs rounded to powers of two, with a precision.
"""

from __future__ import annotations

from math import log2
from typing import Any

from effens_kernels import _dispatch

from ..contestants import Contestant, Problem
from ..contestants.backends import on_backend
from ..graphs import SUFFIX, graphed
from ..results import MEASURES
from ..runner import Lineup
from ..timing import measure
from .cold import evict_l2, release_memory
from .families import Family
from .precision import TOLERANCE, precision
from .tiled import TILES, tiled

SECONDS = {"cuda": 1.5, "cpu": 0.02}
ROUNDS = {"cuda": 3, "cpu": 1}
BACKENDS = {"torch": "reference", "cuda": "cuda", "triton": "triton"}  # "cuda": with the tile that it chooses itself
MODES = ("eager", "graphed")


def bucket(sizes: tuple[int, ...]) -> dict[str, int]:
    return {letter: 2 ** round(log2(max(1, size))) for letter, size in zip("EBIO", sizes)}


def run_bucket(family: Family, workload: Any, name: str, device: str, cold: bool) -> dict[str, Any]:
    release_memory()
    with precision(name) as dtype:
        problem = Problem(workload, dtype, device)
        lineup = Lineup(TOLERANCE.get(name))
        for candidate, backend in BACKENDS.items():
            lineup.admit(candidate, lambda c=candidate, b=backend: _of_backend(family, problem, c, b), "backend")
        for tile in TILES:
            lineup.admit(f"cuda tile {tile}", lambda tile=tile: _of_tile(family, problem, tile), "backend")
        for contestant in list(lineup.runnable):
            lineup.admit(contestant.name + SUFFIX, lambda c=contestant: graphed(c, device), "backend")
        before = evict_l2(device if cold else "cpu")
        timings = measure(lineup.runnable, SECONDS[device], device, ROUNDS[device], before=before)
    seconds: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    for candidate, timing in timings.items():
        mode = "graphed" if candidate.endswith(SUFFIX) else "eager"
        found = {kind: getattr(timing, kind).median for kind in MEASURES}
        seconds[mode][candidate.removesuffix(SUFFIX)] = found
    return {
        **bucket(family.sizes(workload)),
        "precision": name,
        "options": family.options(workload),
        "cold": cold,
        "fastest": {mode: {kind: _fastest(seconds[mode], kind) for kind in MEASURES} for mode in MODES},
        "seconds": seconds,
        "not applicable": {entry.name: entry.reason for entry in lineup.entries.values() if entry.reason},
    }


def _of_backend(family: Family, problem: Problem, name: str, backend: str) -> Contestant:
    # The rehearsal's emulation is asked like the GPU; what cannot run says so.
    _dispatch.select(_dispatch.Problem(family.op, problem.device, problem.dtype), backend)
    function = on_backend(family.op, backend, family.options(problem.workload))
    return family.from_function(problem, name, function, kind="backend")


def _of_tile(family: Family, problem: Problem, tile: int) -> Contestant:
    function = tiled(family.op, family.options(problem.workload).get("activation"), tile)
    return family.from_function(problem, f"cuda tile {tile}", function, kind="backend")


def _fastest(seconds: dict[str, dict[str, float]], kind: str) -> str | None:
    return min(seconds, key=lambda candidate: seconds[candidate][kind], default=None)
