"""The one table of the environment variables that matter to this package.

Standard library only, and no import from the package: setup.py loads this file too.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable; `choices` None: free text; `default` "" : unset."""

    name: str
    meaning: str
    default: str
    choices: tuple[str, ...] | None
    read: str


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable(
            "EFFENS_BACKEND",
            "backend of every op that gets no backend= argument; unset: the fastest that can run the call",
            "",
            ("reference", "cpu", "triton", "cuda"),
            "at import",
        ),
        Variable(
            "EFFENS_CPU_ISA",
            "instruction set of the C++ CPU engine; unset: the best of this machine",
            "",
            ("baseline", "avx2", "avx512", "avx512_bf16", "amx"),
            "at the first CPU call",
        ),
        Variable(
            "EFFENS_NATIVE",
            "0: behave as if the compiled extension were not installed (tests, debugging)",
            "1",
            ("0", "1"),
            "at import",
        ),
        Variable(
            "EFFENS_CUDA",
            "compile the CUDA kernels; auto: where nvcc is found; 1: fail where it is not",
            "auto",
            ("auto", "0", "1"),
            "at build",
        ),
        Variable(
            "TORCH_CUDA_ARCH_LIST",
            "GPU architectures to compile the CUDA kernels for, in PyTorch's notation",
            "8.0+PTX;9.0a;10.0a",
            None,
            "at build",
        ),
        Variable("MAX_JOBS", "parallel compilations; unset: one per core", "", None, "at build"),
        Variable(
            "EFFENS_CUDA_EMULATION",
            "library that runs the CUDA C++ kernels on the CPU, slowly (`make emulation` builds it, for the tests)",
            "",
            None,
            "at import",
        ),
        Variable(
            "TRITON_INTERPRET",
            "1: Triton's interpreter runs the Triton kernels on the CPU, slowly (Triton's own variable)",
            "0",
            ("0", "1"),
            "at import",
        ),
    )
}


def get(name: str) -> str:
    """Value of a variable of the table, else its default; ValueError lists the choices if the value is none of them."""
    variable = VARIABLES[name]
    value = os.environ.get(name) or variable.default
    if value and variable.choices is not None and value not in variable.choices:
        raise ValueError(f"environment variable {name} should be one of {', '.join(variable.choices)}; got {value!r}")
    return value


def is_set(name: str) -> bool:
    """The variable is in the environment and not empty (an empty value counts as unset, as usual in shells)."""
    return bool(os.environ.get(name))


def markdown_table() -> str:
    """The table of the README."""
    rows = ["| variable | meaning | values | default | read |", "|---|---|---|---|---|"]
    for name, meaning, default, choices, read in VARIABLES.values():
        values = ", ".join(f"`{choice}`" for choice in choices) if choices else "text"
        rows.append(f"| `{name}` | {meaning} | {values} | {f'`{default}`' if default else 'unset'} | {read} |")
    return "\n".join(rows)


# The default backend is fixed at import, so that a traced or compiled program cannot depend on a later change.
BACKEND: str | None = get("EFFENS_BACKEND") or None
