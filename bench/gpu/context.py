"""What a part is given: where it runs, how long it may take, and a file that survives it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any


class PartError(Exception):
    """The part did not succeed; the message is the reason that the report shows."""

    status = "failed"


class UnavailableError(PartError):
    """Something that the part needs is not on this machine."""

    status = "unavailable"


class IncompleteError(PartError):
    """The time was not enough; what is there is kept, and the next call goes on from it."""

    status = "incomplete"


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: a part may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(data), indent=1) + "\n")
    temporary.replace(path)


def _rounded(data: Any) -> Any:
    """Five digits, more than a clock is good for: files stay small."""
    if isinstance(data, float):
        return float(f"{data:.5g}")
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, list | tuple) else data


@dataclass
class Context:
    device: str  # "cuda", or "cpu" in a rehearsal
    seconds: float  # that the part may take
    path: Path | None = None  # of the part's record; None: nothing is kept
    record: dict[str, Any] = field(default_factory=dict)
    compile: bool = True
    build: bool = True
    begin: float = field(default_factory=monotonic)

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def data(self) -> dict[str, Any]:
        return self.record.setdefault("data", {})

    def left(self) -> float:
        return self.begin + self.seconds - monotonic()

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.record)


def last_line(text: str, default: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else default


def tail(text: str, lines: int = 25) -> list[str]:
    return [line[:200] for line in text.splitlines()[-lines:]]


def first_containing(text: str, words: Sequence[str]) -> str | None:
    return next((line.strip()[:300] for line in text.splitlines() if any(word in line for word in words)), None)
