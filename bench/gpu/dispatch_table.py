"""Make the dispatch table of a GPU from its report.

python -m bench.gpu.dispatch_table bench/results/<gpu>/report-<date>.json

Of each bucket, the backend whose eager forward and backward together took least: what users run unless they capture
graphs, where the differences are smaller.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from effens_kernels import _tables

BACKENDS = {"torch": "reference", "triton": "triton"}  # all others are the CUDA kernels, with one tile or another


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for bucket in report["dispatch"]:
        winner = bucket["eager"]["total"]
        if winner is not None:
            sizes = {letter: bucket[letter] for letter in "EBIO"}
            backend = BACKENDS.get(winner, "cuda")
            found.append({"op": "grouped_linear", "precision": bucket["precision"], **sizes, "backend": backend})
    return sorted(found, key=lambda row: [row["precision"], *(row[letter] for letter in "EBIO")])


def write(report: dict[str, Any], folder: Path) -> Path:
    """The file of the report's GPU; where the figures are from stays in it."""
    provenance = report["provenance"]
    lines = ",\n  ".join(json.dumps(row) for row in rows(report))
    path = folder / f"{_tables.slug(provenance['device'])}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"provenance": {json.dumps(provenance)},\n "rows": [\n  {lines}\n]}}\n')
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    print(f"wrote {write(json.loads(args.report.read_text()), _tables.DIRECTORY)}")


if __name__ == "__main__":
    main()
