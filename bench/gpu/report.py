"""All parts of a device in one file, with a plot of each family beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..results import Results, Row, row_of
from . import goals
from .context import write_json
from .families import FAMILIES, Column, Family, each_column
from .layers import MODES
from .parts import PARTS
from .store import SCHEMA, Store, now

TITLES = {"eager": "each kernel issued by the host", "graphed": "CUDA graphs"}


def write(store: Store) -> tuple[Path, list[Path], str]:
    """The report, its plots, and why there is none."""
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
    return path, *_plots(records, path)


def provenance(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the part that ran last."""
    known = [record for record in records.values() if "provenance" in record]
    return max(known, key=lambda record: record.get("date", ""), default={}).get("provenance", {})


def dispatch(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Which backend and tile is fastest, by bucket; the times are in the parts."""
    found = []
    for family, column in each_column():
        for bucket in records.get(family.part(column), {}).get("data", {}).get("buckets", {}).values():
            sizes = {name: bucket[name] for name in ("E", "B", "I", "O", "precision")}
            found.append({"op": family.op, **sizes, **bucket["fastest"]})
    return found


def rows(records: dict[str, dict[str, Any]], family: Family, column: Column, mode: str) -> list[Row]:
    layers = records.get(family.part(column), {}).get("data", {}).get("layers", {})
    found = [row_of(layer[mode]) for layer in layers.values()]
    return [row for row in found if row.ours and row.of_kind("limit")]


def title(column: Column, mode: str) -> str:
    limit = "a copy of the same bytes" if column.limit == "copy" else "plain products"
    return f"{column.title}, {TITLES[mode]} (limit: {limit})"


def _plots(records: dict[str, dict[str, Any]], path: Path) -> tuple[list[Path], str]:
    measured = {
        family.name: [row for column in family.columns for mode in MODES for row in rows(records, family, column, mode)]
        for family in FAMILIES.values()
    }
    if not any(measured.values()):
        return [], "nothing has been timed yet"
    try:
        from ..plot import plot
    except ImportError as error:
        return [], f"no plot: {error}"
    titles = {
        f"{family.name}-{column.name}-{mode}": title(column, mode) for family, column in each_column() for mode in MODES
    }
    images = []
    for name, found in measured.items():
        if found:
            images.append(path.with_name(f"{path.stem}-{name}.png"))
            plot(Results(provenance(records), found), images[-1], titles, "the limit")
    return images, ""
