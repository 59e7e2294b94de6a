"""A picture of a result file: time relative to the limit, a panel for each suite, dtype and number of threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .contestants import SUITES
from .contestants.base import COMPILE, COMPILE_MAX, LOOP, OURS, PER_MEMBER
from .results import Results, Row

COLORS = {
    LOOP: "#c9ced6",
    "sum per member": "#c9ced6",
    "einsum": "#8093ad",
    "mm": "#5d7596",
    "synthesis + bmm": "#8093ad",
    "outputs + einsum": "#5d7596",
    "synthesis + loop": "#8093ad",
    "synthesis + groups": "#5d7596",
    "vmap": "#a9b4c4",
    "baddbmm": "#8093ad",
    "bmm + bias": "#6b84a3",
    "grouped_mm": "#5d7596",
    "broadcast": "#a9b4c4",
    "fold + bmm": "#8093ad",
    "tabm": "#5d7596",
    "grouped convolution": "#5d7596",
    COMPILE: "#3f5878",
    COMPILE_MAX: "#22344c",
    PER_MEMBER: "#b9c98a",
    "torch.mm": "#b9c98a",
    "torch.baddbmm": "#b9c98a",
    OURS: "#e4572e",
    f"{OURS} (cuda)": "#ee8a6b",
    f"{OURS} (triton)": "#f3a98f",
}
FALLBACK_COLOR = "#f9d3c5"  # our other backends
LEGEND_COLUMNS = 7
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)


def plot(
    results: Results, path: Path, titles: Mapping[str, str] | None = None, limit: str = "plain matrix products"
) -> None:
    """`titles`: of suites that are not in the table of suites."""
    titles = {name: suite.title for name, suite in SUITES.items()} | dict(titles or {})
    panels: dict[tuple[str, str, int], list[Row]] = {}
    for row in results.rows:
        panels.setdefault((row.suite, row.dtype, row.threads), []).append(row)
    most = max(len(rows) for rows in panels.values())
    figure, axes = plt.subplots(
        len(panels), squeeze=False, figsize=(max(9.0, 1.9 * most), 3.6 * len(panels) + 1.0), layout="constrained"
    )
    handles: dict[str, BarContainer] = {}
    for axis, ((suite, dtype, threads), rows) in zip(axes.flat, panels.items(), strict=True):
        handles.update(_panel(axis, rows))
        title = titles.get(suite, suite)
        count = f", {threads} {'thread' if threads == 1 else 'threads'}" if threads else ""  # none: on a GPU
        axis.set_title(
            f"{title}   ({dtype}{count})",
            loc="left",
            fontsize=11,
            fontweight="bold",
        )
    order = sorted(handles, key=_rank)
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside upper center",
        ncols=min(len(order), LEGEND_COLUMNS),
        frameon=False,
    )
    figure.supylabel(f"forward + backward, time relative to {limit} (log scale, lower is better)", fontsize=10)
    facts = results.provenance
    figure.text(
        1,
        0,
        f"{facts['device']}, torch {facts['versions']['torch']}, commit {facts['commit']}, "
        f"{facts['date'][:10]}. Medians; whiskers: 20th to 80th percentile.",
        ha="right",
        va="top",
        fontsize=8,
        color="#666666",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def _rank(name: str) -> tuple[int, str]:
    return list(COLORS).index(name) if name in COLORS else len(COLORS), name


def _panel(axis: Axes, rows: list[Row]) -> dict[str, BarContainer]:
    """Bars grow from the limit, so that their height is what a contestant wastes; returns one bar a contestant."""
    timed = {e.name for row in rows for e in row.entries if e.kind != "limit" and e.timing}
    names = sorted(timed, key=_rank)
    width = 0.84 / max(1, len(names))
    handles, high, low = {}, 2.0, 1.0
    for n, name in enumerate(names):
        for group, row in enumerate(rows):
            entry, bound = row.entry(name), row.of_kind("limit")
            if entry is None or bound is None:
                continue
            limit, stat = bound.seconds().median, entry.seconds()
            ratio = stat.median / limit
            x = group + (n - (len(names) - 1) / 2) * width
            handles[name] = axis.bar(
                x, ratio - 1, width * 0.92, bottom=1, color=COLORS.get(name, FALLBACK_COLOR), zorder=3
            )
            axis.plot(
                [x, x], [stat.p20 / limit, stat.p80 / limit], color="#222222", linewidth=0.8, zorder=4, clip_on=True
            )
            high, low = max(high, ratio), min(low, ratio)
            ours = name == OURS
            axis.annotate(
                f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f}",
                (x, max(1, min(stat.p80 / limit, 1.25 * ratio))),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5 if len(rows) * len(names) < 40 else 6.3,
                color=COLORS[OURS] if ours else "#555555",
                fontweight="bold" if ours else "normal",
                zorder=6,
                bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )
    axis.set_yscale("log")
    axis.set_ylim(low / 1.12, high * 1.5)
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_xlim(-0.5, len(rows) - 0.4)
    axis.set_xticks(range(len(rows)), [fill(row.workload, 18) for row in rows], fontsize=8.5)
    axis.tick_params(length=0)
    axis.grid(axis="y", color="#e6e6e6", zorder=0)
    axis.axhline(1, color="#222222", linewidth=1.2, zorder=5)
    axis.annotate(
        "limit", (len(rows) - 0.4, 1), ha="right", va="bottom", fontsize=8, xytext=(0, 1), textcoords="offset points"
    )
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return handles
