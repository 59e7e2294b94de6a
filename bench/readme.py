"""Regenerates the tables of the README between their markers, from the newest result file with the fewest threads.

<!-- bench:forum:start -->  ...  <!-- bench:forum:end -->      float32 rows of the suite "forum"
<!-- bench:layers-bfloat16:start -->  ...                      bfloat16 rows of the suite "layers"

python -m bench.readme [--readme README.md] [--results bench/results]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .contestants import SUITES
from .provenance import ROOT
from .results import DIRECTORY, Results, Row, result_files
from .tables import markdown_table, reasons

MARKED = re.compile(
    r"(<!-- bench:(?P<suite>\w+)(?:-(?P<dtype>\w+))?:start -->\n).*?(<!-- bench:(?P=suite)(?:-\w+)?:end -->)", re.DOTALL
)


def update(readme: Path, directory: Path = DIRECTORY) -> list[str]:
    """Rewrite every marked block that a result file can fill; returns a line about each."""
    report = []

    def fill(match: re.Match[str]) -> str:
        suite, dtype = match["suite"], match["dtype"] or "float32"
        found = []
        for path in result_files(directory):
            results = Results.load(path)
            rows = _rows(results, suite, dtype)
            if rows:
                found.append((results, rows, path))
        if found:  # one thread rather than more, then the newest
            results, rows, path = min(found, key=lambda each: each[1][0].threads)
            report.append(f"{suite}, {dtype}: {len(rows)} rows from {path.name}")
            return f"{match[1]}{_block(results, rows, path)}\n{match[4]}"
        report.append(f"{suite}, {dtype}: left as it is, no result file in {directory} has it")
        return match[0]

    text = readme.read_text()
    new = MARKED.sub(fill, text)
    if new != text:
        readme.write_text(new)
    return report or [f"{readme} has no markers <!-- bench:NAME:start -->"]


def _rows(results: Results, suite: str, dtype: str) -> list[Row]:
    """The workloads of the short run; the long ones are in the file."""
    short = {str(workload): n for n, workload in enumerate(SUITES[suite].workloads)} if suite in SUITES else {}
    rows = [row for row in results.rows if row.suite == suite and row.dtype == dtype and row.workload in short]
    return sorted(rows, key=lambda row: (row.threads, short[row.workload]))


def _block(results: Results, rows: list[Row], path: Path) -> str:
    facts = results.provenance
    threads = sorted({row.threads for row in rows})
    count = " and ".join(map(str, threads)) + (" thread" if threads == [1] else " threads")
    caption = (
        f"Forward + backward, milliseconds, {rows[0].dtype}, {count}; {facts['device']}, "
        f"{facts['instruction set']}, torch {facts['versions']['torch']}, commit {facts['commit']}, "
        f"{facts['date'][:10]} (`{path.name}`). Bold: the fastest peer, and effens_kernels."
    )
    notes = "".join(f"\n- n/a, {reason}" for reason in reasons(rows))
    return f"{caption}\n\n{markdown_table(rows)}\n" + (f"{notes}\n" if notes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="folder of result files (%(default)s)")
    args = parser.parse_args()
    print("\n".join(update(args.readme, args.results)))


if __name__ == "__main__":
    main()
