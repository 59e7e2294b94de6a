"""Rows as a table on the terminal and in the README: contestants' milliseconds, then what they mean for us."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from .results import Entry, Row

_BREAK = re.compile(r"(?<=\w)(?:_|\.| (?=[(/+]))|(?<=Python) |(?<=,) ")  # after which a terminal's header is broken
SUMMARY = ("ours / limit", "best peer / ours", "loop / ours")


class Layout(NamedTuple):
    """What all rows of a table have in common, and what differs between them."""

    rows: Sequence[Row]
    contestants: list[str]
    dtypes: bool  # the rows differ in dtype
    threads: bool

    @classmethod
    def of(cls, rows: Sequence[Row], backends: bool = True) -> Layout:
        """`backends` includes our backends other than the default one."""
        order: dict[str, None] = {}
        for row in rows:
            order.update((entry.name, None) for entry in row.entries if backends or entry.kind != "backend")
        names = sorted(order, key=lambda name: _kind(rows, name) == "limit")
        return cls(rows, names, len({row.dtype for row in rows}) > 1, len({row.threads for row in rows}) > 1)

    def labels(self, row: Row) -> list[str]:
        return [row.workload] + [row.dtype] * self.dtypes + [str(row.threads)] * self.threads

    def headers(self) -> list[str]:
        return ["workload"] + ["dtype"] * self.dtypes + ["threads"] * self.threads + self.contestants + list(SUMMARY)


def _kind(rows: Sequence[Row], name: str) -> str:
    return next(entry.kind for row in rows for entry in row.entries if entry.name == name)


def milliseconds(seconds: float) -> str:
    """Three digits, all that a clock is good for."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _figures(row: Row, measure: str) -> list[str]:
    values = (row.to_limit(measure), row.over_best_peer(measure), row.over_loop(measure))
    return ["–" if value is None else f"{value:.2f}" for value in values]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why contestants are missing, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for entry in row.entries:
            if entry.reason:
                found.setdefault((entry.name, entry.reason), []).append(row.workload)
    return [f"{name}: {reason} ({_some(workloads)})" for (name, reason), workloads in found.items()]


def _some(workloads: list[str]) -> str:
    names = list(dict.fromkeys(workloads))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# ------------------------------------------------------------------------------------------------------- terminal


def terminal_table(title: str, rows: Sequence[Row], measure: str) -> Table:
    layout = Layout.of(rows)
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="ms: median, with the 20th and 80th percentile relative to it; *: fastest peer; n/a: not applicable",
        caption_justify="left",
    )
    for n, header in enumerate(layout.headers()):
        words = _BREAK.sub(r"\g<0>\n", header) if n else header
        table.add_column(words if "\n" in words else f"\n{words}", justify="right" if n else "left", no_wrap=True)
    for row in rows:
        best, by_name = row.best_peer(measure), {entry.name: entry for entry in row.entries}
        cells = [_cell(by_name.get(name), measure, best) for name in layout.contestants]
        limit, peer, loop = _figures(row, measure)
        table.add_row(*layout.labels(row), *cells, f"[cyan]{limit}[/]", _verdict(peer), _verdict(loop))
    return table


def _cell(entry: Entry | None, measure: str, best: Entry | None) -> str:
    if entry is None or entry.timing is None:
        return "[dim]n/a[/]"
    stat = entry.seconds(measure)
    style, mark = ("bold", "*") if entry is best else ("bold cyan" if entry.kind == "ours" else "default", "")
    return (
        f"[{style}]{mark}{milliseconds(stat.median)}[/]\n"
        f"[dim]{_relative(stat.p20 / stat.median)}{_relative(stat.p80 / stat.median)}[/]"
    )


def _relative(ratio: float) -> str:
    return f"{ratio - 1:+.0%}" if ratio < 10 else f"x{ratio:.0f}"


def _verdict(figure: str) -> str:
    return figure if figure == "–" else f"[{'green' if float(figure) >= 1 else 'red'}]{figure}[/]"


# --------------------------------------------------------------------------------------------------------- README


def markdown_table(rows: Sequence[Row], measure: str = "total") -> str:
    layout = Layout.of(rows, backends=False)
    headers = [header.replace("\n", " ") for header in layout.headers()]
    lines = [_line(headers), _line(["---"] + ["---:"] * (len(headers) - 1))]
    for row in rows:
        best, by_name = row.best_peer(measure), {entry.name: entry for entry in row.entries}
        cells = []
        for name in layout.contestants:
            entry = by_name.get(name)
            text = "n/a" if entry is None or entry.timing is None else milliseconds(entry.seconds(measure).median)
            cells.append(f"**{text}**" if entry is not None and (entry is best or entry.kind == "ours") else text)
        workload, *labels = layout.labels(row)
        lines.append(_line([f"`{workload}`", *labels, *cells, *_figures(row, measure)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
