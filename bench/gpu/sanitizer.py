"""The parts `memcheck` and `racecheck`: compute-sanitizer watches every kernel variant."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..provenance import ROOT
from .context import Context, PartError, UnavailableError, last_line, tail

ERRORS_FOUND = 86  # the exit status that we ask the sanitizer for
REFUSALS = ("Device not supported", "not supported on this device", "Failed to initialize", "Unable to find injection")


def run(context: Context, tool: str) -> None:
    script = [sys.executable, "-m", "bench.gpu.every_kernel", "--device", context.device]
    sanitizer = None if context.rehearsal else find()
    if context.rehearsal:
        script.append("--quick")
        context.data["note"] = f"no {tool}: a plain run in the emulation, which makes the same checks itself"
    elif sanitizer is None:
        raise UnavailableError("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    options = ["--tool", tool, "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20"]
    # What torch asks the driver at its start may be refused by right; our own calls raise where they fail.
    options += ["--report-api-errors", "no"] * (tool == "memcheck")
    command = script if sanitizer is None else [sanitizer, *options, *script]
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    called = re.search(r"(\d+) variants called, (\d+) results wrong", output)
    summary = re.search(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    context.data.update(
        {
            "tool": f"{sanitizer} --tool {tool}" if sanitizer else "none",
            "variants": int(called[1]) if called else 0,
            "summary": summary[1] if summary else "",
        }
    )
    if done.returncode == 0 and called and (summary or sanitizer is None):
        return
    context.data["log"] = tail(output, 40)
    refusal = next((word for word in REFUSALS if word in output), None)
    if refusal is not None and not (summary and done.returncode == ERRORS_FOUND and called):
        raise UnavailableError(f"compute-sanitizer refuses this device or machine: {refusal}")
    if called and int(called[2]):
        raise PartError(f"{called[2]} results are wrong")
    raise PartError(summary[1] if summary else last_line(output, f"it ended with status {done.returncode}"))


def find() -> str | None:
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = ["compute-sanitizer", *(str(p / "compute-sanitizer") for p in [*places, Path("/usr/local/cuda/bin")])]
    return next(filter(None, map(shutil.which, candidates)), None)
