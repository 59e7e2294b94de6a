"""Summary: a table of numbers that prints in a terminal, with rich."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Summary(NamedTuple):
    """Rows of numbers and words under named columns; the first column is words.

    `print(summary)` and `rich.print(summary)` show a table; `summary.rows` is what it shows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | None, ...], ...]
    total: tuple[str | int | None, ...]
    notes: tuple[str, ...]

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, caption="\n".join(self.notes), box=box.SIMPLE_HEAD, show_footer=True)
        table.caption_justify = "left"
        for n, (name, footer) in enumerate(zip(self.columns, self.total)):
            table.add_column(name, _shown(footer), justify="right" if n else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(_shown, row))
        return table

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError as missing:
            raise ImportError(
                "a summary is printed with rich: pip install rich (summary.rows needs it not)"
            ) from missing
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def of_parts(title: str, parts: Sequence[tuple[str, int, int]], num_members: int, plain: int) -> Summary:
    """Parameters of parts of a model by name, those that members share and those that each has, and all together."""
    shared, own = sum(part[1] for part in parts), sum(part[2] for part in parts)
    total = shared + num_members * own
    notes = (
        f"{total:,} parameters in all, {total / plain:.2f} times the plain model",
        f"{num_members * plain:,} in {num_members} plain models",
    )
    return Summary(title, ("part", "shared", "per member"), tuple(parts), ("all", shared, own), notes)


def _shown(value: str | int | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value
