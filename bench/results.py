"""What a run measured, the figures that follow from it, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .contestants.base import LOOP
from .timing import Stat, Timing

SCHEMA = 1
DIRECTORY = Path(__file__).resolve().parent / "results"
LOCAL = DIRECTORY / "local"
DISTURBED = 1.3  # ratio of the limit's percentiles
MEASURES = ("total", "forward", "backward")


@dataclass(frozen=True)
class Entry:
    """One contestant of a row: its timing, or the reason why it has none."""

    name: str
    kind: str
    note: str = ""
    timing: Timing | None = None
    reason: str = ""

    def seconds(self, measure: str = "total") -> Stat:
        return getattr(self.timing, measure)


@dataclass(frozen=True)
class Row:
    """One workload in one dtype with one number of threads."""

    suite: str
    workload: str
    dtype: str
    threads: int
    forward_flops: int
    backward_flops: int
    entries: list[Entry] = field(default_factory=list)

    def entry(self, name: str) -> Entry | None:
        """The entry of that name if it was timed."""
        return next((entry for entry in self.entries if entry.name == name and entry.timing), None)

    def of_kind(self, kind: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.kind == kind and entry.timing), None)

    @property
    def ours(self) -> Entry | None:
        return self.of_kind("ours")

    def best_peer(self, measure: str = "total") -> Entry | None:
        peers = [entry for entry in self.entries if entry.kind == "peer" and entry.timing]
        return min(peers, key=lambda entry: entry.seconds(measure).median, default=None)

    def disturbed(self) -> bool:
        """Plain products take the same time again and again, unless another program uses the machine."""
        limit = self.of_kind("limit")
        return limit is not None and limit.seconds().p80 > DISTURBED * limit.seconds().p20

    def to_limit(self, measure: str = "total") -> float | None:
        """Our time over the limit's: 1 is perfect."""
        return _ratio(self.ours, self.of_kind("limit"), measure)

    def over_best_peer(self, measure: str = "total") -> float | None:
        """The best peer's time over ours: above 1 we are faster."""
        return _ratio(self.best_peer(measure), self.ours, measure)

    def over_loop(self, measure: str = "total") -> float | None:
        return _ratio(self.entry(LOOP), self.ours, measure)


def _ratio(above: Entry | None, below: Entry | None, measure: str) -> float | None:
    if above is None or below is None:
        return None
    return above.seconds(measure).median / below.seconds(measure).median


@dataclass(frozen=True)
class Results:
    provenance: dict[str, Any]
    rows: list[Row]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent == LOCAL:  # what a user measures at home stays out of git
            (LOCAL / ".gitignore").write_text("*\n")
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {data.get('schema')}, this program reads {SCHEMA}")
        return cls(data["provenance"], [row_of(row) for row in data["rows"]])


def row_of(data: dict[str, Any]) -> Row:
    entries = []
    for entry in data["entries"]:
        timing = entry["timing"] and Timing(**{measure: Stat(**entry["timing"][measure]) for measure in MEASURES})
        entries.append(Entry(**{**entry, "timing": timing}))
    return Row(**{**data, "entries": entries})


def result_files(directory: Path = DIRECTORY) -> list[Path]:
    """Newest first, by the date inside."""
    dated = [(json.loads(path.read_text())["provenance"]["date"], path) for path in directory.glob("*.json")]
    return [path for _, path in sorted(dated, reverse=True)]
