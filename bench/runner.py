"""One row of the report: build the contestants of a workload, check that they agree, time them in turns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .contestants import Contestant, Problem, Suite
from .contestants.base import COMPILE, check_equal, results
from .results import Entry, Row
from .timing import Timing, fixed_threads, measure

PROBE_SECONDS = 0.3


class Lineup:
    """The contestants of a problem, each verified against the first when it is admitted."""

    def __init__(self, tolerance: float | None = None) -> None:
        self.entries: dict[str, Entry] = {}  # in the order of the columns
        self.runnable: list[Contestant] = []
        self.expected: dict[str, Tensor] = {}
        self.tolerance = tolerance

    def admit(self, name: str, build: Callable[[], Contestant], kind: str = "peer") -> Contestant | None:
        """Build and verify; a contestant that raises or differs is kept as not applicable, with the reason."""
        try:
            logging.disable(logging.ERROR)  # torch.compile logs what it then raises
            contestant = build()
            found = results(contestant)
            check_equal(found, self.expected or found, self.tolerance)
        except Exception as error:  # whatever a peer raises is a reason to show
            self.refuse(name, kind, _reason(error))
            return None
        finally:
            logging.disable(logging.NOTSET)
        if not self.expected:
            self.expected.update(found)
        self.add(contestant)
        return contestant

    def refuse(self, name: str, kind: str, reason: str) -> None:
        self.entries[name] = Entry(name, kind, reason=reason)

    def add(self, contestant: Contestant) -> None:
        """Without a check: a limit computes something else."""
        self.entries[contestant.name] = Entry(contestant.name, contestant.kind, contestant.note)
        self.runnable.append(contestant)

    def timed(self, timings: Mapping[str, Timing]) -> list[Entry]:
        return [replace(entry, timing=timings.get(name)) for name, entry in self.entries.items()]


def run_row(
    suite: Suite,
    workload: Any,
    dtype: torch.dtype,
    threads: int,
    device: str,
    seconds: float,
    compile_best: bool = True,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> Row:
    """`progress` is told what happens now and how much of the row is done."""
    problem = Problem(workload, dtype, device)
    lineup = Lineup()
    with fixed_threads(threads):
        progress("building", 0.0)
        for name, build in suite.peers.items():
            lineup.admit(name, lambda build=build: build(problem))
        if compile_best and suite.compiles:
            progress("compiling", 0.05)
            for peer in fastest_first(lineup.runnable, device):  # the first that can be compiled
                if lineup.admit(COMPILE, peer.compiled):
                    break
        for contestant in suite.ours(problem):
            lineup.admit(contestant.name, lambda contestant=contestant: contestant, contestant.kind)
        lineup.add(suite.limit(problem))
        timings = measure(lineup.runnable, seconds, device, progress=lambda done: progress("timing", 0.3 + 0.7 * done))
    return Row(
        suite.name,
        str(workload),
        str(dtype).removeprefix("torch."),
        threads,
        *suite.flops(workload),
        lineup.timed(timings),
    )


def fastest_first(peers: list[Contestant], device: str) -> list[Contestant]:
    timings = measure(peers, PROBE_SECONDS, device, min_rounds=3)
    return sorted(peers, key=lambda peer: timings[peer.name].total.median)


def _reason(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first if len(first) <= 160 else first[:157] + "..."
