"""What each compiled CUDA kernel takes of each architecture: the table in docs/cuda-kernels.md.

python tests/cuda_budgets.py            prints the table
python tests/cuda_budgets.py --update   writes it: on purpose, after a look at what has changed
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from effens_kernels import _native

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cuda-kernels.md"
HEADER = "| kernel | operands | slope | tile | type | math | threads | shared | tensor cores |"
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
MATH = ("fma", "tf32", "half")  # as in csrc/kernels/contract.cuh
ENTRY = re.compile(
    r"(?P<name>contract|mlp_wgrad|wgrad|rank1_fwd|rank1_dgrad|rank1_wgrad)_kernelINS\w*?5BlockI(?P<type>f|6__half|13__nv_bfloat16)LNS\w*?4MathE(?P<math>\d)E"
    r"Li(?P<m>\d+)ELi(?P<n>\d+)ELb(?P<a>\d)ELb(?P<b>\d)ELb(?P<through>\d)E"
)
MLP_ENTRY = re.compile(
    r"(?P<name>mlp_fwd|mlp_dgrad)_kernelINS\w*?8MlpBlockI(?P<type>f|6__half|13__nv_bfloat16)LNS\w*?4MathE(?P<math>\d)E"
    r"Li(?P<rows>\d+)E"
)
PLAIN = (
    *("add_parts", "mix_fwd", "mix_bwd", "mix_add"),
    *("predict_fwd", "predict_stats", "predict_classes", "predict_bwd", "predict_bwd_long"),
    *("regression_fwd", "regression_bwd"),
)
PLAIN_ENTRY = re.compile(
    rf"\d(?P<name>{'|'.join(PLAIN)})_kernelI(?P<type>f|6__half|13__nv_bfloat16)(Li(?P<tile>\d+)E)?E"
)
UNTYPED = ("index_lists", "predict_add")
UNTYPED_ENTRY = re.compile(rf"\d(?P<name>{'|'.join(UNTYPED)})_kernelILi\d+E")


class Kernel(NamedTuple):
    name: str
    operands: str  # along which axis A and B are contiguous
    slope: str  # A is a gradient taken through an activation
    tile: str
    type: str
    math: str

    @staticmethod
    def plain(name: str, type: str, tile: int) -> Kernel:
        """One that is no product, or one of few rows; 0 for no tile."""
        sizes = {"mix_fwd": f"{tile} rows", "mix_bwd": f"{tile}x{tile}"}
        return Kernel(name, "-", "-", sizes.get(name, "-"), type, "-")

    @staticmethod
    def mlp(name: str, type: str, rows: int, math: str) -> Kernel:
        """A chain of products of so many rows; forward and backward are kernels of different names."""
        return Kernel(name, "k, k" if name == "mlp_fwd" else "k, n", "-", f"{rows} rows", type, math)

    @staticmethod
    def of(mangled: str) -> Kernel | None:
        if found := PLAIN_ENTRY.search(mangled):
            return Kernel.plain(found["name"], TYPES[found["type"]], int(found["tile"] or 0))
        if found := UNTYPED_ENTRY.search(mangled):
            return Kernel.plain(found["name"], "-", 0)
        if found := MLP_ENTRY.search(mangled):
            return Kernel.mlp(found["name"], TYPES[found["type"]], int(found["rows"]), MATH[int(found["math"])])
        found = ENTRY.search(mangled)
        if found is None:
            return None
        operands = f"{'k' if found['a'] == '1' else 'm'}, {'k' if found['b'] == '1' else 'n'}"
        slope = "yes" if found["through"] == "1" else "no"
        math = MATH[int(found["math"])]
        return Kernel(found["name"], operands, slope, f"{found['m']}x{found['n']}", TYPES[found["type"]], math)


class Usage(NamedTuple):
    registers: int
    stack: int  # bytes, of spills as of calls
    tensor: int  # tensor-core instructions
    async_copies: int


class Row(NamedTuple):
    """One line of the table: what does not depend on the architecture, and registers by architecture."""

    threads: int
    shared: int
    tensor: bool
    registers: dict[str, int]


@cache
def measured() -> dict[str, dict[Kernel, Usage]]:
    """By architecture, as "80" or "90a"."""
    usage = _cuobjdump("-res-usage")
    code = _cuobjdump("-sass")
    instructions: dict[tuple[str, Kernel], Counter[str]] = {}
    arch, kernel = "", None
    for line in code:
        arch = _architecture(line) or arch
        if "Function :" in line:
            kernel = Kernel.of(line)
        elif kernel is not None and (found := re.search(r"\b(HMMA|LDGSTS)\b", line)):
            instructions.setdefault((arch, kernel), Counter())[found[1]] += 1
    result: dict[str, dict[Kernel, Usage]] = {}
    for line in usage:
        arch = _architecture(line) or arch
        kernel = (Kernel.of(line) if "Function" in line else None) or kernel
        found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", line)
        if found and kernel is not None:
            registers, stack, local = map(int, found.groups())
            counts = instructions.get((arch, kernel), Counter())
            result.setdefault(arch, {})[kernel] = Usage(registers, stack + local, counts["HMMA"], counts["LDGSTS"])
            kernel = None
    return result


@cache
def described() -> dict[Kernel, tuple[int, int]]:
    """(threads, bytes of shared memory) of each kernel that the launches can reach."""
    result = {}
    for math, types in (("fma", ["float32"]), ("tf32", ["float32"]), ("half", ["float16", "bfloat16"])):
        for line in _native.cuda_ops.cuda_kernels(math).splitlines():
            name, *numbers = line.split()
            side, a, b, through, threads, shared = map(int, numbers)
            operands = f"{'k' if a else 'm'}, {'k' if b else 'n'}"
            for type in types:
                kernel = Kernel(name, operands, "yes" if through else "no", f"{side}x{side}", type, math)
                if name in UNTYPED:
                    kernel = Kernel.plain(name, "-", 0)
                elif name in PLAIN:
                    kernel = Kernel.plain(name, type, side)
                elif name in ("mlp_fwd", "mlp_dgrad"):
                    kernel = Kernel.mlp(name, type, side, math)
                result[kernel] = threads, shared
    return result


def budgets() -> dict[Kernel, Row]:
    """The table in docs/."""
    lines = iter(PAGE.read_text().splitlines())
    header = next(line for line in lines if line.startswith(HEADER))
    archs = [cell.strip().removeprefix("sm_") for cell in header.removeprefix(HEADER).strip("|").split("|")]
    next(lines)
    result = {}
    for line in lines:
        if not line.startswith("|"):
            break
        *names, threads, shared, tensor, rest = (cell.strip() for cell in line.strip("|").split("|", 9))
        registers = dict(zip(archs, map(int, rest.split("|"))))
        result[Kernel(*names)] = Row(int(threads), int(shared), tensor == "yes", registers)
    return result


def table() -> str:
    archs = sorted(measured(), key=lambda arch: int(arch.rstrip("af")))
    lines = [f"{HEADER} {' | '.join(f'sm_{arch}' for arch in archs)} |", "|---" * (9 + len(archs)) + "|"]
    for kernel, (threads, shared) in sorted(described().items()):
        tensor = "yes" if measured()[archs[0]][kernel].tensor else "no"
        registers = [measured()[arch][kernel].registers for arch in archs]
        lines.append("| " + " | ".join(map(str, (*kernel, threads, shared, tensor, *registers))) + " |")
    return "\n".join(lines)


def _architecture(line: str) -> str | None:
    found = re.match(r"\s*arch = sm_(\w+)", line)
    return found[1] if found else None


def _cuobjdump(option: str) -> list[str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, option, _native.LIBRARY], check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


if __name__ == "__main__":
    if "--update" in sys.argv:
        text = PAGE.read_text()
        begin, end = text.index(HEADER), text.index("\n\n", text.index(HEADER))
        PAGE.write_text(text[:begin] + table() + text[end:])
    else:
        print(table())
