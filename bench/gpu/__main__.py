"""The command line: chooses parts, runs them one after the other, writes and shows the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import torch

import bench.gpu

from ..provenance import device_name, slug
from ..results import DIRECTORY, LOCAL
from . import report
from .launch import launch
from .parts import LIMIT, PARTS, Part
from .store import PASSED, Store

MARGIN_SECONDS = 15.0  # of a budget: for the merge, and for a part that ends late


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    begin = monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA GPU here; --dry rehearses every part on the CPU", file=sys.stderr)
        return 2
    store = open_store(args)
    if args.list:
        show(store, args.part, {}, brief=True)
        return 0

    def left() -> float:
        return float("inf") if args.budget is None else args.budget - (monotonic() - begin) - MARGIN_SECONDS

    todo = [PARTS[name] for name in args.part if args.again or status(store, PARTS[name]) != PASSED]
    # A report from elsewhere may say that it was built, which does not make it true of this machine.
    if any(part.needs_extension for part in todo) and PARTS["build"] not in todo:
        todo.insert(0, PARTS["build"])
    options = ["--no-compile"] * args.no_compile + ["--no-build"] * args.no_build
    not_begun: dict[str, str] = {}
    for part in todo:
        needed = min(part.seconds, args.limit) if not args.dry else 5.0
        if left() < needed and not (part.name == "build" and left() > 0):
            not_begun[part.name] = f"not begun: it takes about {needed:.0f} s, {max(0.0, left()):.0f} s were left"
            continue
        print(f"{part.name}: {part.what} ...", flush=True)
        if args.again:
            store.forget(part)
        record = launch(part, store, args.device, min(args.limit, left()), *options)
        reason = f": {record['reason']}" if record.get("reason") else ""
        print(f"{part.name}: {record['status']} after {record['seconds']:.0f} s{reason}", flush=True)

    show(store, args.part, not_begun)
    return 0 if all(status(store, PARTS[name]) == PASSED for name in args.part) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=bench.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="only these (default: all)")
    parser.add_argument("--again", action="store_true", help="also parts that have passed")
    parser.add_argument("--list", action="store_true", help="show what has passed, run nothing")
    parser.add_argument("--budget", type=float, help="seconds for everything: parts that would not fit are not begun")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one part (default: %(default)g)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes long to start")
    parser.add_argument("--no-build", action="store_true", help="use the extension as it is, or fail")
    parser.add_argument("--dry", action="store_true", help="rehearse every part on the CPU, with tiny sizes")
    parser.add_argument(
        "--output", type=Path, help="folder for the device's folder (default: bench/results, rehearsals: its local)"
    )
    args = parser.parse_args(arguments)
    args.device = "cpu" if args.dry else "cuda"
    args.part = [name for name in PARTS if name in args.part]
    return args


def open_store(args: argparse.Namespace) -> Store:
    if args.dry:
        from effens_kernels import _config

        device = f"rehearsal on {device_name('cpu', _config.config())}"
    else:
        device = torch.cuda.get_device_name()
    folder = (args.output or (LOCAL if args.dry else DIRECTORY)) / slug(device)
    if folder.parent == LOCAL:  # stays out of git
        LOCAL.mkdir(parents=True, exist_ok=True)
        (LOCAL / ".gitignore").write_text("*\n")
    store = Store(folder, device, torch.__version__)
    restored = store.restore()
    if restored:
        print(f"taken from an earlier report: {', '.join(restored)}")
    return store


def status(store: Store, part: Part) -> str:
    return (store.load(part) or {}).get("status", "not run")


def show(store: Store, chosen: list[str], not_begun: dict[str, str], brief: bool = False) -> None:
    records = store.records()
    path, images, no_plot = (None, [], "") if brief else report.write(store)
    try:
        from rich.console import Console

        from . import table
    except ImportError as error:
        print(f"no tables: {error}")
        for name, record in records.items():
            print(f"{name}: {record['status']} {record.get('reason', '')}")
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=220)
        if not brief:
            table.times(console, records)
            table.fastest(console, records)
            table.reached(console, records)
            table.ceilings(console, records)
        table.states(console, records, chosen, not_begun)
    for line in filter(None, (path and f"wrote {path}", *(f"      {image}" for image in images), no_plot)):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
