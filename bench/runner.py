"""One row of the report: build the contestants of a workload, check that they agree, time them in turns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contestants import Contestant, Problem, Suite
from .contestants.base import COMPILE, check_equal, results
from .results import Entry, Row
from .timing import fixed_threads, measure

PROBE_SECONDS = 0.3


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
    entries: dict[str, Entry] = {}  # in the order of the columns
    runnable: list[Contestant] = []
    expected: dict[str, Tensor] = {}

    def admit(name: str, build: Callable[[], Contestant], kind: str = "peer") -> None:
        """Build and verify; a contestant that raises or differs is kept as not applicable, with the reason."""
        try:
            logging.disable(logging.ERROR)  # torch.compile logs what it then raises
            contestant = build()
            found = results(contestant)
            check_equal(found, expected or found)
        except Exception as error:  # whatever a peer raises is a reason to show
            entries[name] = Entry(name, kind, reason=_reason(error))
            return
        finally:
            logging.disable(logging.NOTSET)
        if not expected:
            expected.update(found)
        entries[name] = Entry(name, contestant.kind, contestant.note)
        runnable.append(contestant)

    with fixed_threads(threads):
        progress("building", 0.0)
        for name, build in suite.peers.items():
            admit(name, lambda build=build: build(problem))
        if compile_best:
            progress("compiling", 0.05)
            for peer in _fastest_first(runnable, device):  # the first that can be compiled
                admit(COMPILE, peer.compiled)
                if entries[COMPILE].reason == "":
                    break
        for contestant in suite.ours(problem):
            admit(contestant.name, lambda contestant=contestant: contestant, contestant.kind)
        limit = suite.limit(problem)
        entries[limit.name] = Entry(limit.name, limit.kind)
        timings = measure(
            [*runnable, limit], seconds, device, progress=lambda done: progress("timing", 0.3 + 0.7 * done)
        )
    for name, timing in timings.items():
        entry = entries[name]
        entries[name] = Entry(entry.name, entry.kind, entry.note, timing)
    return Row(
        suite.name,
        str(workload),
        str(dtype).removeprefix("torch."),
        threads,
        *suite.flops(workload),
        list(entries.values()),
    )


def _fastest_first(peers: list[Contestant], device: str) -> list[Contestant]:
    timings = measure(peers, PROBE_SECONDS, device, min_rounds=3)
    return sorted(peers, key=lambda peer: timings[peer.name].total.median)


def _reason(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first if len(first) <= 160 else first[:157] + "..."
