"""A measured layer, with the questions that goals ask, and a goal's answer: what was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..contestants.base import COMPILED
from ..results import Entry, Row, row_of

OURS = ("automatic", "cuda", "triton")


@dataclass(frozen=True)
class Line:
    family: str
    column: str
    layer: str
    goal: str
    target: float | None  # None: shown for information
    at_most: bool  # the target is an upper bound
    reached: dict[str, float | None]  # by what runs ours: the automatic choice, and each kernel backend

    @property
    def ratio(self) -> float | None:
        """How much of the target the automatic choice reaches: 1 or more is reached."""
        value = self.reached["automatic"]
        if self.target is None or value is None:
            return None
        return self.target / max(value, 1e-12) if self.at_most else value / self.target

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        if self.ratio is None:
            return "not measured"
        return "met" if self.ratio >= 1 else "missed"


class Layer:
    """What was measured of one layer; the methods that return lines are what the goals of a family are made of."""

    def __init__(self, family: str, column: str, name: str, data: dict[str, Any], ceilings: dict[str, Any]) -> None:
        self.family, self.column, self.name, self.data, self.ceilings = family, column, name, data, ceilings
        self.eager, self.graphed = row_of(data["eager"]), row_of(data["graphed"])
        self.case = data["case"]

    @property
    def of_device(self) -> Row:
        """Where the host's time does not count."""
        return self.graphed if self.graphed.ours else self.eager

    def line(
        self, goal: str, target: float | None, value: Callable[[Entry], float | None], row: Row, at_most: bool = False
    ) -> Line:
        by_note = {entry.note: entry for entry in row.entries if entry.kind in ("ours", "backend") and entry.timing}
        entries = (row.ours, by_note.get("backend cuda"), by_note.get("backend triton"))
        reached = {who: value(entry) if entry else None for who, entry in zip(OURS, entries)}
        return Line(self.family, self.column, self.name, goal, target, at_most, reached)

    def over(
        self, goal: str, target: float | None, peers: list[Entry | None], row: Row, measure: str = "total"
    ) -> Line:
        """The fastest peer's time over ours."""
        times = [entry.seconds(measure).median for entry in peers if entry]
        best = min(times, default=None)
        return self.line(goal, target, lambda ours: best and best / ours.seconds(measure).median, row)

    def to_limit(self, goal: str, target: float | None, row: Row, measure: str) -> Line:
        """Our time over the limit's."""
        limit = row.of_kind("limit")
        least = limit and limit.seconds(measure).median
        return self.line(goal, target, lambda ours: least and ours.seconds(measure).median / least, row, at_most=True)

    def kernels(self, forward: int | None, backward: int | None) -> Iterator[Line]:
        """How many are launched, each direction with its target."""
        for direction, target in (("forward", forward), ("backward", backward)):

            def count(ours: Entry, direction: str = direction) -> float | None:
                return self.data["counts"].get(ours.name, {}).get("launches", {}).get(direction)

            yield self.line(f"kernels, {direction}", target, count, self.eager, at_most=True)

    def host_times(self, peer: str, allowed: float | None = None) -> Iterator[Line]:
        """Microseconds for the host to issue a call, beside those of a peer; `allowed`: how many more they may be."""
        for direction in ("forward", "backward"):

            def microseconds(entry: Entry, direction: str = direction) -> float | None:
                found = self.data["counts"].get(entry.name, {}).get("host", {}).get(direction)
                return found and found["median"] * 1e6

            entry = self.eager.entry(peer)
            theirs = entry and microseconds(entry)
            compared = f" ({peer}: {theirs:.0f})" if theirs else ""
            target = theirs + allowed if theirs and allowed is not None else None
            yield self.line(f"host, {direction}, µs{compared}", target, microseconds, self.eager, at_most=True)

    def bandwidths(self, forward: float | None, backward: float | None) -> Iterator[Line]:
        """Bytes that cannot be avoided over our time, relative to the measured bandwidth of a copy."""
        copy = self.ceilings.get("copy", {}).get("TB/s")
        for direction, target, count in zip(("forward", "backward"), (forward, backward), self.data["bytes"]):

            def of_copy(ours: Entry, direction: str = direction, count: int = count) -> float | None:
                return copy and count / ours.seconds(direction).median / (copy * 1e12)

            yield self.line(f"of copy bandwidth, {direction}", target, of_copy, self.of_device)

    def of_gemm_rate(self) -> Line:
        flops = self.eager.forward_flops + self.eager.backward_flops
        rate = self.ceilings.get(self.eager.dtype, {}).get("TFLOP/s")

        def reached(ours: Entry) -> float | None:
            return rate and flops / ours.seconds().median / (rate * 1e12)

        return self.line("of the cuBLAS rate at 8192³", None, reached, self.of_device)

    @staticmethod
    def peers(row: Row, compiled: bool = True) -> list[Entry]:
        """That were timed; `compiled`: those of torch.compile too."""
        peers = [entry for entry in row.entries if entry.kind == "peer" and entry.timing]
        return [entry for entry in peers if compiled or entry.name not in COMPILED]
