"""What is built, what runs here, and why not: `effens_kernels.show_config()`, `python -m effens_kernels`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any, TextIO

import torch

from . import _dispatch, _env, _native
from ._version import __version__


def config() -> dict[str, dict[str, str]]:
    """Facts about this process by section, then name: versions, CPU, GPUs, backends, environment variables."""
    return {
        "versions": {
            "effens_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton_version(),
            "cuda of torch": torch.version.cuda or "none (a build without CUDA)",
        },
        "machine": {"platform": platform.platform(), **_cpu(), **_gpus()},
        "backends": {name: _dispatch.why_not_here(name) or "available" for name in _dispatch.BACKENDS},
        "environment": {name: os.environ[name] for name in _env.VARIABLES if _env.is_set(name)},
    }


def show_config(file: TextIO | None = None) -> None:
    """Print `config()` as aligned text, to standard output unless `file` is given."""
    sections = config()
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        print(f"{title}:", file=file)
        for name, value in (section or {"": "none of this package's variables is set"}).items():
            print(f"  {name:<{width}}  {value}" if name else f"  {value}", file=file)


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "cpu": _cpu_name(),
        "threads": f"{torch.get_num_threads()} used by torch, {usable} usable by this process",
    }
    if _native.available:
        facts["instruction set"] = f"{_isa()} (this machine can run {_native.ops.cpu_isa_supported()})"
    return facts


def _isa() -> str:
    try:
        return _native.ops.cpu_isa()
    except RuntimeError as error:  # EFFENS_CPU_ISA names one that this machine lacks: to be shown, not to fail on
        return str(error).splitlines()[0]


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "no CUDA GPU is visible"}
    return {f"gpu {index}": _gpu(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())}


def _gpu(properties: Any) -> str:
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
