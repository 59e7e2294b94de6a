"""Runs a part in a process of its own, within its time; whatever becomes of it, its record says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from time import monotonic
from typing import Any

from ..provenance import ROOT
from .context import last_line, tail
from .parts import Part
from .store import PASSED, Store, now
from .suite import EMULATION

GRACE_SECONDS = 25.0  # for a part to end by itself what it began in time
KILL_SECONDS = 10.0


def launch(part: Part, store: Store, device: str, seconds: float, *options: str) -> dict[str, Any]:
    """The part's record, as it is in its file; `options` of the worker."""
    before = store.load(part) or {}
    store.save(part, {"status": "running", "data": before.get("data", {}) if part.resumes else {}})
    path = store.path(part)
    command = [sys.executable, "-m", "bench.gpu.worker", part.name, str(path.resolve()), "--device", device]
    command += ["--seconds", str(seconds), *options]
    begin = monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(part, device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = False
    try:
        output, _ = process.communicate(timeout=seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        stopped, output = True, _stop(process)
    except KeyboardInterrupt:
        _stop(process)
        raise
    record = store.load(part) or {"status": "running"}
    if stopped and record["status"] != PASSED:
        record |= {"status": "timeout", "reason": f"stopped after {monotonic() - begin:.0f} s"}
    elif record["status"] == "running" or (process.returncode != 0 and record["status"] == PASSED):
        words = last_line(output, "it said nothing")
        record |= {"status": "failed", "reason": f"its process ended with status {process.returncode}: {words}"}
    record.setdefault("date", now())
    record.setdefault("seconds", monotonic() - begin)
    if record["status"] != PASSED:
        record["output"] = tail(output)
    store.save(part, record)
    return record


def environment(part: Part, device: str) -> dict[str, str]:
    """The caller's, without what would replace the GPU's kernels; in a rehearsal with it, where a part asks for it."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cuda":
        for name in ("TRITON_INTERPRET", "EFFENS_CUDA_EMULATION", "EFFENS_BACKEND"):
            found.pop(name, None)
    else:
        found["TRITON_INTERPRET"] = "1" if "triton" in part.arguments else "0"
        if EMULATION.exists():
            found.setdefault("EFFENS_CUDA_EMULATION", str(EMULATION))
    return found


def _stop(process: subprocess.Popen) -> str:
    """The process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # SIGINT may be ignored, as below nohup
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            return process.communicate(timeout=KILL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    return process.communicate()[0]
