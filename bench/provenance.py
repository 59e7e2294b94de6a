"""Where a figure comes from: machine, versions, commit, date.  A figure without these is worth nothing."""

from __future__ import annotations

import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from effens_kernels import _config

ROOT = Path(__file__).resolve().parent.parent


def provenance(device: str = "cpu") -> dict[str, Any]:
    facts = _config.config()
    return {
        "device": device_name(device, facts),
        "instruction set": _instruction_set(facts),
        "driver": _driver() if device == "cuda" else "",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "blas": _blas(),
        **facts,
    }


def device_name(device: str, facts: dict[str, dict[str, str]]) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return facts["machine"].get("cpu", "unknown CPU")


def _instruction_set(facts: dict[str, dict[str, str]]) -> str:
    """What our CPU engine uses, else what torch uses."""
    ours = facts["machine"].get("instruction set", "")
    return ours.split(" (")[0] or torch.backends.cpu.get_cpu_capability()


def commit() -> str:
    """The git commit, marked where the working tree differs from it; "unknown" outside a checkout."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD").strip()
        changes = _git("status", "--porcelain", "--", "effens_kernels", "csrc", "bench", ":!bench/results", "examples")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision}, with uncommitted changes" if changes.strip() else revision


def slug(text: str) -> str:
    """A file name made of a device's name."""
    text = re.sub(r"\((R|TM|C|tm)\)|\bCPU\b|@.*", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def _blas() -> str:
    """The library behind torch.mm on a CPU, as far as torch tells."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


GPU_STATE = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


def gpu_state() -> dict[str, str]:
    """Clocks and what limits them, as far as nvidia-smi tells; read, never set."""
    return {name: _nvidia_smi(name) for name in GPU_STATE}


def _driver() -> str:
    return _nvidia_smi("driver_version")


def _nvidia_smi(name: str) -> str:
    query = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
