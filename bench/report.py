"""python -m bench.report: how fast every contestant is here, as tables, a plot and a result file.

    python -m bench.report                          float32 on 1 thread, a few minutes
    python -m bench.report --threads 1 2 --dtype float32 bfloat16 --op layers
    python -m bench.report --full --save --update-readme

Results go to bench/results/local, which git ignores; --save puts them among the committed ones in bench/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import readme
from .contestants import SUITES, Suite
from .plot import plot
from .provenance import ROOT, provenance, slug
from .results import DIRECTORY, DISTURBED, LOCAL, MEASURES, Results, Row
from .runner import run_row
from .tables import reasons, terminal_table

SECONDS = {"quick": 5.0, "full": 10.0}  # of timing for each row, where steps are short enough


class Job(NamedTuple):
    suite: Suite
    workload: Any
    dtype: torch.dtype
    threads: int


def main() -> None:
    args = arguments()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=170)
    facts = provenance(args.device)
    console.print(
        f"{facts['device']}, {facts['instruction set']}, torch {facts['versions']['torch']}, effens_kernels "
        f"{facts['versions']['effens_kernels']}, commit {facts['commit']}"
    )
    for backend, state in facts["backends"].items():
        console.print(f"[dim]backend {backend}: {state}", overflow="ellipsis", no_wrap=True)

    rows = run(jobs(args), args, console)
    for measure in args.measure:
        for suite in args.op:
            chosen = [row for row in rows if row.suite == suite]
            if not chosen:
                continue
            what = "forward + backward" if measure == "total" else measure
            console.print(terminal_table(f"{SUITES[suite].title}, {what}, {describe(args)}", chosen, measure))
    for reason in reasons(rows):
        console.print(f"n/a, {reason}", style="dim", markup=False)

    disturbed = sum(row.disturbed() for row in rows)
    if disturbed:
        console.print(
            f"[yellow]{disturbed} of {len(rows)} rows were disturbed: the plain products themselves varied by more "
            f"than {DISTURBED:g} x between the 20th and the 80th percentile. Repeat on a quiet machine."
        )

    results = Results(facts, rows)
    path = args.output or (DIRECTORY if args.save else LOCAL) / f"{slug(facts['device'])}-{facts['date'][:10]}.json"
    results.save(path)
    plot(results, path.with_suffix(".png"))
    console.print(f"\nwrote {path}\n      {path.with_suffix('.png')}", soft_wrap=True)
    if args.update_readme:
        console.print(*readme.update(ROOT / "README.md", path.parent), sep="\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the README's workloads, float32, 1 thread (default)")
    length.add_argument("--full", action="store_true", help="more layers, float32 and bfloat16, 1 and 2 threads")
    parser.add_argument("--op", nargs="+", choices=SUITES, default=list(SUITES), help="which suites (default: all)")
    parser.add_argument("--workload", default="", help="only workloads whose name contains this")
    parser.add_argument("--threads", nargs="+", type=int, help="numbers of CPU threads, one after the other")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURES,
        default=["total", "forward"],
        help="which tables to print; the result file has all (default: total forward)",
    )
    parser.add_argument("--seconds", type=float, help="of timing for each row, divided among its contestants")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes long to start")
    parser.add_argument("--output", type=Path, help="result file (default: by device and date in bench/results/local)")
    parser.add_argument("--save", action="store_true", help="write to bench/results, whose files are committed")
    parser.add_argument("--update-readme", action="store_true", help="fill the README's tables from the result file")
    args = parser.parse_args()
    args.threads = args.threads or ([1, 2] if args.full else [1])
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.full else ["float32"])
    args.seconds = args.seconds or SECONDS["full" if args.full else "quick"]
    if min(args.threads) < 1:
        parser.error("--threads should be at least 1")
    if not jobs(args):
        parser.error(f"no workload's name contains {args.workload!r}")
    return args


def jobs(args: argparse.Namespace) -> list[Job]:
    return [
        Job(SUITES[name], workload, getattr(torch, dtype), threads)
        for name in args.op
        for dtype in args.dtype
        for threads in args.threads
        for workload in SUITES[name].workloads + SUITES[name].more_workloads * args.full
        if args.workload in str(workload)
    ]


def run(plan: list[Job], args: argparse.Namespace, console: Console) -> list[Row]:
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for job in plan:

            def show(what: str, fraction: float, job: Job = job) -> None:
                dtype = str(job.dtype).removeprefix("torch.")
                progress.update(
                    task,
                    completed=len(rows) + fraction,
                    description=f"{job.workload}, {dtype}, threads: {job.threads}, {what}",
                )

            rows.append(run_row(*job, args.device, args.seconds, not args.no_compile, show))
    return rows


def describe(args: argparse.Namespace) -> str:
    parts = [args.dtype[0]] * (len(args.dtype) == 1) + [f"threads: {args.threads[0]}"] * (len(args.threads) == 1)
    return ", ".join(parts) or "ms"


if __name__ == "__main__":
    main()
