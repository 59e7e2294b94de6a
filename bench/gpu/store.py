"""Records of parts on disk, what they hold for, and the report that they are merged into."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from ..provenance import ROOT
from .context import write_json
from .parts import PARTS, Part

SCHEMA = 1
SKIPPED_FOLDERS = {"results", "__pycache__", "build"}
SKIPPED_SUFFIXES = {".so", ".o", ".pyc", ".png"}
PASSED = "passed"


def key(part: Part, device: str, torch_version: str) -> dict[str, str]:
    """What a record holds for.  The sources' digest rather than the commit: a checkout may have changes, or no git."""
    return {"sources": digest(part.sources), "device": device, "torch": torch_version}


@cache
def digest(sources: tuple[str, ...]) -> str:
    total = hashlib.sha256()
    for name in sources:
        top = ROOT / name
        for path in sorted(_files(top) if top.is_dir() else [top]):
            total.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(where) / name for name in names if Path(name).suffix not in SKIPPED_SUFFIXES]
    return found


class Store:
    """The folder of one device: `parts/<part>.json` and `report-<date>.json`."""

    def __init__(self, folder: Path, device: str, torch_version: str) -> None:
        self.folder, self.device, self.torch = folder, device, torch_version

    def path(self, part: Part) -> Path:
        return self.folder / "parts" / f"{part.name}.json"

    def key(self, part: Part) -> dict[str, str]:
        return key(part, self.device, self.torch)

    def load(self, part: Part) -> dict[str, Any] | None:
        """The part's record if it holds for these sources, this device and this torch."""
        return _matching(_read(self.path(part)), self.key(part))

    def save(self, part: Part, record: dict[str, Any]) -> None:
        write_json(self.path(part), {"schema": SCHEMA, "part": part.name, "key": self.key(part), **record})

    def forget(self, part: Part) -> None:
        self.path(part).unlink(missing_ok=True)

    def restore(self) -> list[str]:
        """Take what parts/ lacks from reports: one file is easier to carry to and from a machine than many."""
        restored = []
        for report in reversed(self.reports()):
            for name, record in (_read(report) or {}).get("parts", {}).items():
                part = PARTS.get(name)
                if part and self.load(part) is None and _matching(record, self.key(part)):
                    write_json(self.path(part), record)
                    restored.append(name)
        return restored

    def reports(self) -> list[Path]:
        return sorted(self.folder.glob("report-*.json"))

    def records(self) -> dict[str, dict[str, Any]]:
        found = {name: self.load(part) for name, part in PARTS.items()}
        return {name: record for name, record in found.items() if record is not None}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if data.get("schema") == SCHEMA else None


def _matching(record: dict[str, Any] | None, wanted: dict[str, str]) -> dict[str, Any] | None:
    return record if record and record.get("key") == wanted else None


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
