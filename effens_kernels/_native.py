"""Finds and loads the compiled extension once, at import, or remembers why not in words.

Loading registers the operators of torch.ops.effens_kernels_native; it queries no GPU, compiles and writes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from . import _env

# One name for every Python version: the file uses no Python API, only libtorch's stable ABI.
LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    """Load the extension; the reason if that is not possible."""
    _env.get("EFFENS_CPU_ISA")  # the C++ side reads it at its first call; a misspelt value is better found now
    if _env.get("EFFENS_NATIVE") == "0":
        return "the compiled extension is switched off by EFFENS_NATIVE=0"
    if not LIBRARY.exists():
        if not sys.platform.startswith("linux"):
            return f"the compiled extension is built on Linux only, and this is {sys.platform}"
        return (
            f"the compiled extension was not built ({LIBRARY} does not exist): no C++ compiler was found when the "
            "package was installed, or this is a source tree without a build. Install g++ 11 or later "
            "(apt-get install g++) and run pip install again"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            # torch wraps the loader's own words, which name the missing symbol or library.
            f"the compiled extension was built but did not load under torch {torch.__version__}: "
            f"{error.__cause__ or error}. "
            "It needs torch >= 2.10; with that, run pip install again"
        )
    return None


def _load_emulation() -> bool:
    """The CUDA kernels compiled for the host: another library, which implements the same operators for CPU tensors."""
    library = _env.get("EFFENS_CUDA_EMULATION")
    if not library or not available:
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise OSError(f"EFFENS_CUDA_EMULATION: {library} does not load: {error.__cause__ or error}") from error
    return True


_why_not = _load()

available: bool = _why_not is None
ops: Any = torch.ops.effens_kernels_native if available else None
cuda_ops: Any = torch.ops.effens_kernels_cuda if available else None  # schemas; the kernels need not be there

emulates_cuda: bool = _load_emulation()


def why_not() -> str | None:
    """Why the compiled extension is not in use; None if it is."""
    return _why_not


def has_cuda_kernels() -> bool:
    """The extension was built with its CUDA kernels (which says nothing of a GPU being there)."""
    return available and torch._C._dispatch_has_kernel_for_dispatch_key(
        "effens_kernels_cuda::grouped_linear_fwd", "CUDA"
    )
