"""All parts of a device in one file, with a plot beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..results import Results, Row, row_of
from . import goals
from .columns import COLUMNS
from .context import write_json
from .layers import MODES
from .parts import PARTS
from .store import SCHEMA, Store, now

TITLES = {"eager": "each kernel issued by the host", "graphed": "CUDA graphs"}


def write(store: Store) -> tuple[Path, Path | None, str]:
    """The report, its plot, and why there is no plot."""
    records = store.records()
    # A step of the merge: parts measured on another day keep their date in their own record.
    path = store.folder / f"report-{now()[:10]}.json"
    write_json(
        path,
        {
            "schema": SCHEMA,
            "date": now(),
            "provenance": provenance(records),
            "status": {name: records.get(name, {}).get("status", "not run") for name in PARTS},
            "goals": [goals.as_data(line) for line in goals.lines(records)],
            "dispatch": dispatch(records),
            "parts": records,
        },
    )
    plot, reason = _plot(records, path)
    return path, plot, reason


def provenance(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the part that ran last."""
    known = [record for record in records.values() if "provenance" in record]
    return max(known, key=lambda record: record.get("date", ""), default={}).get("provenance", {})


def dispatch(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Which backend and tile is fastest, by bucket; the times are in the parts."""
    found = []
    for column in COLUMNS:
        for bucket in records.get(f"bench-stacked-{column}", {}).get("data", {}).get("buckets", {}).values():
            sizes = {name: bucket[name] for name in ("E", "B", "I", "O", "precision")}
            found.append({**sizes, **bucket["fastest"]})
    return found


def rows(records: dict[str, dict[str, Any]], column: str, mode: str) -> list[Row]:
    layers = records.get(f"bench-stacked-{column}", {}).get("data", {}).get("layers", {})
    found = [row_of(layer[mode]) for layer in layers.values()]
    return [row for row in found if row.ours and row.of_kind("limit")]


def title(column: str, mode: str) -> str:
    limit = "a copy of the same bytes" if COLUMNS[column].limit == "copy" else "plain products"
    return f"{COLUMNS[column].title}, {TITLES[mode]} (limit: {limit})"


def _plot(records: dict[str, dict[str, Any]], path: Path) -> tuple[Path | None, str]:
    found = [row for column in COLUMNS for mode in MODES for row in rows(records, column, mode)]
    if not found:
        return None, "nothing has been timed yet"
    try:
        from ..plot import plot
    except ImportError as error:
        return None, f"no plot: {error}"
    image = path.with_suffix(".png")
    titles = {f"stacked-{column}-{mode}": title(column, mode) for column in COLUMNS for mode in MODES}
    plot(Results(provenance(records), found), image, titles, "the limit")
    return image, ""
