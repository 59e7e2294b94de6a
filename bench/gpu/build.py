"""The part `build`: the extension with CUDA kernels that run on this GPU, compiled for this GPU alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from time import monotonic

from ..provenance import ROOT
from .context import Context, PartError, first_containing, tail

LIBRARY = ROOT / "effens_kernels" / "_C.abi3.so"
TRY = (
    "import sys, torch, effens_kernels as ek; from effens_kernels import _native\n"
    "device = sys.argv[1]\n"
    "sys.exit(_native.why_not()) if not _native.available else None\n"
    "sys.exit('it was built without CUDA kernels') if device == 'cuda' and not _native.has_cuda_kernels() else None\n"
    "backend = 'cuda' if device == 'cuda' or _native.emulates_cuda else 'cpu'\n"
    "x, w = torch.randn(4, 8, device=device), torch.randn(2, 4, 8, device=device)\n"
    "y = ek.grouped_linear(x, w, backend=backend).cpu()\n"
    "assert torch.allclose(y, (x @ w.mT).cpu(), atol=1e-2), 'its results are wrong'\n"
)


def run(context: Context) -> None:
    reason = why_not(context.device)
    context.data["before"] = reason or "the extension was there and runs"
    if reason is None and not outdated():
        return
    if not context.build or context.rehearsal:
        if reason is not None:
            raise PartError(reason)
        context.data["note"] = "the extension runs, but is older than its sources"
        return
    begin = monotonic()
    build = subprocess.run(command(), cwd=ROOT, env={**os.environ, **environment()}, capture_output=True, text=True)
    output = build.stdout + build.stderr
    context.data.update({"seconds of build": round(monotonic() - begin, 1), "environment": environment()})
    if build.returncode != 0:
        context.data["log"] = tail(output, 60)
        error = first_containing(output, ("error:", "Error:", "effens_kernels:")) or "see the log in the part's file"
        raise PartError(f"the build failed: {error}")
    reason = why_not(context.device)
    if reason is not None:
        context.data["log"] = tail(output, 60)
        raise PartError(f"it was built, but: {reason}")


def why_not(device: str) -> str | None:
    """Why the extension cannot run on `device`, found by a process of its own that calls it; None if it can."""
    found = subprocess.run([sys.executable, "-c", TRY, device], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        return None
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"a call of it ended with status {found.returncode}"


def outdated() -> bool:
    """A source is younger than the extension; the build compiles only what changed."""
    built = LIBRARY.stat().st_mtime if LIBRARY.exists() else 0.0
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources = [path for path in sources if not {"tests", "emulation"} & set(path.relative_to(ROOT).parts)]
    return max(path.stat().st_mtime for path in sources) > built


def command() -> list[str]:
    if importlib.util.find_spec("setuptools") is not None:
        return [sys.executable, "setup.py", "build_ext", "--inplace"]
    return [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]


def environment() -> dict[str, str]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    # Instructions of one generation alone ("a") exist from Hopper on.
    return {"EFFENS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{'a' * (major >= 9)}"}
