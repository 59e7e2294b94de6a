"""Which module of an op's folder runs on a backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

MODULES = {"reference": "reference", "cpu": "native", "cuda": "cuda", "triton": "triton"}


def backend_modules(package: str) -> Callable[[str], ModuleType]:
    """From a backend to its module in the folder, imported at first use, since Triton takes long to import."""
    return lambda backend: importlib.import_module(f".{MODULES[backend]}", package)
