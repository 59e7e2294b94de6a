"""Make the dispatch table of a GPU from its report.

python -m bench.gpu.dispatch_table bench/results/<gpu>/report-<date>.json

A row for each op and bucket: the backend whose eager forward and backward together took least.  That is what users run
unless they capture graphs, where the differences are smaller.
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
            op = bucket.get("op", "grouped_linear")  # reports of before there was another
            backend = BACKENDS.get(winner, "cuda")
            found.append({"op": op, "precision": bucket["precision"], **sizes, "backend": backend})
    return found


def write(report: dict[str, Any], folder: Path) -> Path:
    """The file of the report's GPU.  An op keeps its rows if the report has none of it; each says where it is from."""
    path = folder / f"{_tables.slug(report['provenance']['device'])}.json"
    before = json.loads(path.read_text()) if path.exists() else {"provenance": {}, "rows": []}
    new = rows(report)
    measured = {row["op"] for row in new}
    kept = [row for row in before["rows"] if row["op"] not in measured]
    whole = before["provenance"]  # of files with one op, it is not by op
    provenance = {op: whole.get(op, whole) for op in sorted({row["op"] for row in kept})}
    provenance |= dict.fromkeys(sorted(measured), report["provenance"])
    lines = ",\n  ".join(json.dumps(row) for row in sorted(kept + new, key=_place))
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"provenance": {json.dumps(provenance)},\n "rows": [\n  {lines}\n]}}\n')
    return path


def _place(row: dict[str, Any]) -> list[Any]:
    return [row["op"], row["precision"], *(row[letter] for letter in "EBIO")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    print(f"wrote {write(json.loads(args.report.read_text()), _tables.DIRECTORY)}")


if __name__ == "__main__":
    main()
