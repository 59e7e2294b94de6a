"""Which backend and which tile of the CUDA kernels are fastest, by bucket of shapes: what makes a dispatch table.

A bucket is members, batch, inputs and outputs rounded to powers of two, with a precision.
"""

from __future__ import annotations

from math import log2
from typing import Any

from effens_kernels import _dispatch, grouped_linear
from effens_kernels.testing import LinearCase

from ..contestants import Contestant, Problem
from ..contestants.grouped_linear import from_function
from ..graphs import SUFFIX, graphed
from ..results import MEASURES
from ..runner import Lineup
from ..timing import measure
from .cold import evict_l2, release_memory
from .precision import TOLERANCE, precision
from .tiled import TILES, tiled

SECONDS = {"cuda": 1.5, "cpu": 0.02}
ROUNDS = {"cuda": 3, "cpu": 1}
BACKENDS = {"torch": "reference", "cuda": "cuda", "triton": "triton"}  # "cuda": with the tile that it chooses itself
MODES = ("eager", "graphed")


def bucket(case: LinearCase) -> dict[str, int]:
    sizes = {"E": case.members, "B": case.batch, "I": case.inputs, "O": case.outputs}
    return {letter: 2 ** round(log2(max(1, size))) for letter, size in sizes.items()}


def run_bucket(case: LinearCase, name: str, device: str, cold: bool) -> dict[str, Any]:
    release_memory()
    with precision(name) as dtype:
        problem = Problem(case, dtype, device)
        lineup = Lineup(TOLERANCE.get(name))
        for candidate, backend in BACKENDS.items():
            lineup.admit(candidate, lambda c=candidate, b=backend: _of_backend(problem, c, b), "backend")
        for tile in TILES:
            lineup.admit(f"cuda tile {tile}", lambda tile=tile: tiled(problem, tile), "backend")
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
        **bucket(case),
        "precision": name,
        "activation": case.activation,
        "cold": cold,
        "fastest": {mode: {kind: _fastest(seconds[mode], kind) for kind in MEASURES} for mode in MODES},
        "seconds": seconds,
        "not applicable": {entry.name: entry.reason for entry in lineup.entries.values() if entry.reason},
    }


def _of_backend(problem: Problem, name: str, backend: str) -> Contestant:
    # The rehearsal's emulation is asked like the GPU; what cannot run says so.
    _dispatch.select(_dispatch.Problem("grouped_linear", problem.device, problem.dtype), backend)
    activation = problem.workload.activation

    def function(*tensors: Any) -> Any:
        return grouped_linear(*tensors, activation=activation, backend=backend)

    return from_function(problem, name, function, kind="backend")


def _fastest(seconds: dict[str, dict[str, float]], kind: str) -> str | None:
    return min(seconds, key=lambda candidate: seconds[candidate][kind], default=None)
