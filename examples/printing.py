"""What the examples print with."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=110)


def new_table(title: str, *columns: str, caption: str | None = None) -> Table:
    """The first column names the row, the others are numbers."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        min_width=min(len(title), console.width),
        padding=(0, 1, 0, 0),
    )
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", vertical="bottom", no_wrap=n == 0)
    return table
