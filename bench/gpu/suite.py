"""The parts `tests-*`: the tests of the repository that run on a backend, on this GPU."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from ..provenance import ROOT
from .context import Context, PartError, last_line, tail

EMULATION = ROOT / "build" / "cmake" / "effens_cuda_emulation.so"
# Ids name the backend and where it is emulated.  Tests of what compilers make (aot) need no GPU.
SELECTIONS = {
    "cuda": "cuda and not emulation and not aot",
    "triton": "triton and not interpreter and not aot",
}
REHEARSALS = {
    "cuda": ("tests/test_empty.py", "emulation and E0-B0"),
    "triton": ("tests/test_empty.py", "triton and E0-B0"),
}
MAX_FAILURES_NAMED = 50
GRACE_SECONDS = 10


def run(context: Context, backend: str, shard: str = "1/1") -> None:
    from effens_kernels import _dispatch

    if importlib.util.find_spec("pytest") is None:
        raise PartError("pytest is not installed")
    reason = _dispatch.why_not_here(backend)
    if reason is not None:
        raise PartError(f"backend {backend}: {reason}")
    where, selection = REHEARSALS[backend] if context.rehearsal else ("tests", SELECTIONS[backend])
    context.data.update({"selection": selection, "shard": shard, "seed": random.randrange(2**31)})
    context.save()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", where, "-q", "-k", selection, "-p", "bench.gpu.shard"]
        command += ["--shard", shard, "--seed", str(context.data["seed"]), f"--junitxml={results}"]
        command += ["-p", "no:cacheprovider", "--tb=short", *_parallel(context)]
        done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = done.communicate(timeout=max(1.0, context.left()))
            stopped = False
        except subprocess.TimeoutExpired:
            done.send_signal(signal.SIGINT)  # pytest then writes what it knows
            try:
                output, _ = done.communicate(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                done.kill()
                output, _ = done.communicate()
            stopped = True
        if results.exists():
            context.data.update(_counts(results))
    if stopped:
        context.data["log"] = tail(output)
        raise PartError(f"stopped after {context.seconds:.0f} s; the last words were: {last_line(output, 'none')}")
    if done.returncode != 0:
        context.data["log"] = tail(output, 60)
    failed = context.data.get("failed", 0) + context.data.get("errors", 0)
    if failed:
        names = context.data["failures"]
        raise PartError(f"{failed} of {context.data['ran']} tests failed: {names[0]}{' ...' if len(names) > 1 else ''}")
    if done.returncode != 0:
        raise PartError(f"pytest ended with status {done.returncode}: {last_line(output, 'it said nothing')}")
    if not context.data.get("passed"):
        raise PartError(f"no test passed, {context.data.get('skipped', 0)} were skipped")


def _parallel(context: Context) -> list[str]:
    """Triton compiles a kernel a second on one core; pytest-xdist uses more where it is installed."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    if context.rehearsal or workers < 2 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(workers)]


def _counts(results: Path) -> dict[str, object]:
    cases = list(ElementTree.parse(results).iter("testcase"))
    kinds = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for kind, names in kinds.items():
            if case.find(kind) is not None:
                names.append(f"{case.get('classname')}::{case.get('name')}")
                break
    failures = kinds["failure"] + kinds["error"]
    reasons = {(node.get("message") or "")[:120] for case in cases for node in case.iter("skipped")}
    return {
        "ran": len(cases),
        "passed": len(cases) - len(failures) - len(kinds["skipped"]),
        "failed": len(kinds["failure"]),
        "errors": len(kinds["error"]),
        "skipped": len(kinds["skipped"]),
        "failures": failures[:MAX_FAILURES_NAMED],
        "reasons of skips": sorted(reasons)[:10],
    }
