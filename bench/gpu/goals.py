"""The goals for the stacked form on a GPU, and what was reached: a line for each goal and row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..contestants.base import COMPILE, COMPILE_MAX, LOOP, PER_MEMBER
from ..results import Entry, Row, row_of

KERNELS_FORWARD, KERNELS_BACKWARD = 1, 2
OF_E_TIMES_LOOP, FROM_MEMBERS = 0.8, 10
EAGER_PEER, GRAPHED_PEER = 2.0, 1.3
COPY_BANDWIDTH = 0.85
GROUPED_MM_AT_ONE_ROW = 3.0
CUBLAS_PER_MEMBER = 0.95
COMPILED = (COMPILE, COMPILE_MAX)
OURS = ("automatic", "cuda", "triton")


@dataclass(frozen=True)
class Line:
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
    """One measured layer, with the questions that goals ask."""

    def __init__(self, column: str, name: str, data: dict[str, Any], ceilings: dict[str, Any]) -> None:
        self.column, self.name, self.data, self.ceilings = column, name, data, ceilings
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
        return Line(self.column, self.name, goal, target, at_most, reached)

    def over(self, goal: str, target: float | None, peers: list[Entry | None], row: Row, measure: str) -> Line:
        """The fastest peer's time over ours."""
        times = [entry.seconds(measure).median for entry in peers if entry]
        best = min(times, default=None)
        return self.line(goal, target, lambda ours: best and best / ours.seconds(measure).median, row)

    def launches(self, direction: str) -> Callable[[Entry], float | None]:
        return lambda ours: self.data["counts"].get(ours.name, {}).get("launches", {}).get(direction)

    def host(self, direction: str) -> Callable[[Entry], float | None]:
        def microseconds(ours: Entry) -> float | None:
            found = self.data["counts"].get(ours.name, {}).get("host", {}).get(direction)
            return found and found["median"] * 1e6

        return microseconds

    def bandwidth(self, measure: str) -> Callable[[Entry], float | None]:
        """Bytes that cannot be avoided over our time, relative to the measured bandwidth of a copy."""
        forward, backward = self.data["bytes"]
        count = {"forward": forward, "backward": backward, "total": forward + backward}[measure]
        copy = self.ceilings.get("copy", {}).get("TB/s")
        return lambda ours: copy and count / ours.seconds(measure).median / (copy * 1e12)

    def rate(self) -> Callable[[Entry], float | None]:
        flops = self.eager.forward_flops + self.eager.backward_flops
        rate = self.ceilings.get(self.eager.dtype, {}).get("TFLOP/s")
        return lambda ours: rate and flops / ours.seconds().median / (rate * 1e12)


def _peers(row: Row, compiled: bool) -> list[Entry]:
    peers = [entry for entry in row.entries if entry.kind == "peer" and entry.timing]
    return [entry for entry in peers if compiled or entry.name not in COMPILED]


def _launch(layer: Layer) -> Iterator[Line]:
    eager, graphed, members = layer.eager, layer.graphed, layer.case["members"]
    yield layer.line("kernels, forward", KERNELS_FORWARD, layer.launches("forward"), eager, at_most=True)
    yield layer.line("kernels, backward", KERNELS_BACKWARD, layer.launches("backward"), eager, at_most=True)
    if members >= FROM_MEMBERS:
        yield layer.over("loop / ours", OF_E_TIMES_LOOP * members, [eager.entry(LOOP)], eager, "total")
    yield layer.over("best eager peer / ours", EAGER_PEER, _peers(eager, False), eager, "total")
    yield layer.over("best graphed peer / ours", GRAPHED_PEER, _peers(graphed, True), graphed, "total")
    for direction in ("forward", "backward"):
        peer = eager.entry("baddbmm")
        theirs = peer and layer.host(direction)(peer)
        compared = f" (baddbmm: {theirs:.0f})" if theirs else ""
        yield layer.line(f"host, {direction}, µs{compared}", None, layer.host(direction), eager)


def _memory(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    for measure in ("forward", "backward"):
        yield layer.line(f"of copy bandwidth, {measure}", COPY_BANDWIDTH, layer.bandwidth(measure), row)
    if layer.case["batch"] == 1:
        for measure in ("forward", "total"):
            name = "forward + backward" if measure == "total" else measure
            grouped = [row.entry("grouped_mm")]
            yield layer.over(f"grouped_mm / ours, {name}", GROUPED_MM_AT_ONE_ROW, grouped, row, measure)
    yield layer.over("best peer / ours", None, _peers(row, True), row, "total")


def _compute(layer: Layer) -> Iterator[Line]:
    row = layer.of_device
    yield layer.over("mm per member / ours", CUBLAS_PER_MEMBER, [row.entry(PER_MEMBER)], row, "total")
    yield layer.line("of the cuBLAS rate at 8192³", None, layer.rate(), row)
    yield layer.over("best peer / ours", None, _peers(row, True), row, "total")


GOALS = {"launch": _launch, "memory": _memory, "compute": _compute}


def lines(records: dict[str, dict[str, Any]]) -> list[Line]:
    """Of everything that has been measured, complete or not."""
    ceilings = records.get("ceilings", {}).get("data", {})
    found = []
    for column, goals in GOALS.items():
        layers = records.get(f"bench-stacked-{column}", {}).get("data", {}).get("layers", {})
        for name, data in layers.items():
            found += goals(Layer(column, name, data, ceilings))
    return found


def as_data(line: Line) -> dict[str, Any]:
    return {**asdict(line), "ratio": line.ratio, "verdict": line.verdict}
