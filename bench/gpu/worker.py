"""python -m bench.gpu.worker PART FILE: runs one part in this process and keeps its record in FILE.

The record says "running" until the end, so that a process which was killed cannot look like one that passed.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from time import monotonic

from .context import Context, PartError, tail, write_json
from .parts import PARTS
from .store import PASSED, now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-build", action="store_true")
    args = parser.parse_args()

    begin = monotonic()
    record = json.loads(args.file.read_text())
    record |= {"status": "running", "reason": "it ended without a word", "date": now()}
    write_json(args.file, record)
    try:
        record["provenance"] = _provenance(args.device)
        context = Context(args.device, args.seconds, args.file, record, not args.no_compile, not args.no_build, begin)
        part = PARTS[args.part]
        part.run()(context, *part.arguments)
        record |= {"status": PASSED, "reason": ""}
    except PartError as error:
        record |= {"status": error.status, "reason": str(error)}
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {first}"[:300]}
        record["traceback"] = tail(traceback.format_exc())
    record["seconds"] = monotonic() - begin
    write_json(args.file, record)
    return 0 if record["status"] == PASSED else 1


def _provenance(device: str) -> dict[str, object]:
    import torch

    from ..provenance import gpu_state, provenance

    if device == "cpu":
        torch.set_num_threads(1)  # a rehearsal computes next to nothing
    return {**provenance(device), "gpu state": gpu_state() if device == "cuda" else {}}


if __name__ == "__main__":
    sys.exit(main())
