"""The report for a reader: times, goals, and the state of the parts last, where a terminal shows it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..tables import reasons, terminal_table
from . import goals, report
from .families import each_column
from .layers import MODES
from .measured import OURS
from .parts import PARTS
from .precision import PRECISIONS
from .store import PASSED

STYLES = {PASSED: "green", "not run": "dim", "incomplete": "yellow", "unavailable": "yellow"}
VERDICTS = {"met": "green", "missed": "red", "not measured": "yellow", "": "default"}
NOT_RUN = "not run"


def times(console: Console, records: dict[str, dict[str, Any]]) -> None:
    for family, column in each_column():
        shown = []
        for mode in MODES:
            rows = report.rows(records, family, column, mode)
            if rows:
                shown += rows
                title = f"Forward + backward. {report.title(column, mode)}"
                console.print(terminal_table(title, rows, "total"))
        for reason in reasons(shown):
            console.print(f"n/a, {reason}", style="dim", markup=False)


def fastest(console: Console, records: dict[str, dict[str, Any]]) -> None:
    buckets = report.dispatch(records)
    if not buckets:
        return
    table = _table("Fastest by bucket, forward + backward", "op", "E", "B", "I", "O", "precision", *MODES)
    for bucket in buckets:
        about = [str(bucket[name]) for name in ("op", "E", "B", "I", "O", "precision")]
        table.add_row(*about, *(bucket[mode]["total"] or "–" for mode in MODES))
    console.print(table)


def reached(console: Console, records: dict[str, dict[str, Any]]) -> None:
    lines = goals.lines(records)
    if not lines:
        return
    table = _table("Goals", "family", "bound by", "layer", "goal", "target", *OURS, "reached / goal", "")
    for line in lines:
        target = "" if line.target is None else f"{'≤' if line.at_most else '≥'} {line.target:g}"
        verdict = f"[{VERDICTS[line.verdict]}]{line.verdict}[/]"
        values = [_number(line.reached[who]) for who in OURS]
        table.add_row(line.family, line.column, line.layer, line.goal, target, *values, _number(line.ratio), verdict)
    console.print(table)
    asked = [line for line in lines if line.target is not None]
    console.print(f"{sum(line.verdict == 'met' for line in asked)} of {len(asked)} goals met by the automatic choice\n")


def ceilings(console: Console, records: dict[str, dict[str, Any]]) -> None:
    data = records.get("ceilings", {}).get("data", {})
    if "copy" in data:
        rates = [f"{name} {data[name]['TFLOP/s']:.3g} TFLOP/s" for name in PRECISIONS if name in data]
        console.print(f"Measured: copy {data['copy']['TB/s']:.3g} TB/s; products: {', '.join(rates)}", markup=False)


def states(console: Console, records: dict[str, dict[str, Any]], chosen: list[str], reasons: dict[str, str]) -> None:
    """`reasons`: why a part was not begun this time."""
    table = _table("Parts", "part", "what", "state", "seconds", "found")
    for name, part in PARTS.items():
        record = records.get(name, {})
        status = record.get("status", NOT_RUN)
        words = record.get("reason") or _summary(record.get("data", {}))
        words = "; ".join(filter(None, (words, reasons.get(name, ""))))
        seconds = f"{record['seconds']:.0f}" if "seconds" in record else ""
        style = STYLES.get(status, "red")
        marked = name if name in chosen else f"[dim]{name}[/]"
        table.add_row(marked, part.what, f"[{style}]{status}[/]", seconds, words.replace("[", "\\["))
    console.print(table)


def _summary(data: dict[str, Any]) -> str:
    if "passed" in data:
        return f"{data['passed']} passed, {data['failed']} failed, {data['skipped']} skipped"
    if "variants" in data:
        return f"{data['variants']} kernel variants; {data['summary'] or data.get('note', '')}"
    if "layers" in data:
        return f"{len(data['layers'])} layers, {len(data['buckets'])} buckets"
    if "copy" in data:
        return f"copy {data['copy']['TB/s']:.3g} TB/s"
    return str(data.get("note") or data.get("before") or "")


def _table(title: str, *headers: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
