"""The goals of all families, and what was reached: a line for each goal and row."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .families import each_column
from .measured import Layer, Line


def lines(records: dict[str, dict[str, Any]]) -> list[Line]:
    """Of everything that has been measured, complete or not."""
    ceilings = records.get("ceilings", {}).get("data", {})
    found = []
    for family, column in each_column():
        layers = records.get(family.part(column), {}).get("data", {}).get("layers", {})
        for name, data in layers.items():
            found += column.goals(Layer(family.name, column.name, name, data, ceilings))
    return found


def as_data(line: Line) -> dict[str, Any]:
    return {**asdict(line), "ratio": line.ratio, "verdict": line.verdict}
