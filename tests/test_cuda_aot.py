"""The CUDA kernels as compiled for each architecture, without a GPU: what they take, against docs/cuda-kernels.md."""

from __future__ import annotations

import pytest
from common import ROOT
from cuda_budgets import Kernel, budgets, described, measured, table

from effens_kernels import _env, _native

if not _native.has_cuda_kernels():
    if _env.get("EFFENS_CUDA") == "0" or _env.get("EFFENS_NATIVE") == "0":
        pytest.skip("the build leaves the CUDA kernels out (EFFENS_CUDA=0)", allow_module_level=True)
    pytest.fail("the extension was built without nvcc; `make clean test` installs one and builds it", pytrace=False)

ARCHITECTURES = ("80", "90a", "100a")
SHARED_MEMORY = {"80": 163 << 10, "90a": 227 << 10, "100a": 227 << 10}
WHEEL_BYTES = 30 << 20


def over(arch: str, kernel: Kernel) -> list[str]:
    """What `kernel` takes too much of on `arch`, or lacks."""
    usage, (threads, shared), budget = measured()[arch][kernel], described()[kernel], budgets()[kernel]
    found = []
    product, too_large = kernel.math != "-", shared > SHARED_MEMORY[arch]
    # The launch takes a smaller tile where a GPU has no room for the large one, of which nothing may be compiled then.
    empty = too_large and kernel.name == "rank1_wgrad" and kernel.tile == "128x128" and not usage.async_copies
    if usage.registers > budget.registers[arch]:
        found.append(f"{usage.registers} registers, {budget.registers[arch]} in the table")
    if usage.registers * threads > 65536:
        found.append(f"{usage.registers} registers of {threads} threads are more than there are")
    if usage.stack:
        found.append(f"{usage.stack} bytes of stack")
    if (threads, shared) != (budget.threads, budget.shared):
        found.append(f"{threads} threads and {shared} bytes, {budget.threads} and {budget.shared} in the table")
    if too_large and not (kernel.name == "rank1_wgrad" and kernel.tile == "128x128"):
        found.append(f"{shared} bytes of shared memory, a block can have {SHARED_MEMORY[arch]}")
    if product and not empty and bool(usage.tensor) != (kernel.math != "fma"):
        found.append(f"{usage.tensor} tensor-core instructions")
    if (product or kernel.name in ("mix_fwd", "mix_bwd")) and not empty and not usage.async_copies:
        found.append("no asynchronous copies")
    return [f"sm_{arch} {' '.join(kernel)}: {problem}" for problem in found]


def test_budgets():
    print(table())
    problems = [problem for arch in ARCHITECTURES for kernel in measured()[arch] for problem in over(arch, kernel)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_compiled_is_what_can_be_launched(arch):
    """And the table has a line for each."""
    assert set(measured()[arch]) == set(described()) == set(budgets())


def test_a_kernel_over_its_budget_is_caught(monkeypatch):
    kernel = next(iter(budgets()))
    tight = budgets()[kernel]._replace(registers=dict.fromkeys(ARCHITECTURES, 1), shared=2)
    monkeypatch.setitem(globals(), "budgets", lambda: {kernel: tight})
    problems = "\n".join(over("80", kernel))
    assert "registers, 1 in the table" in problems
    assert " and 2 in the table" in problems


def test_the_file_is_small_enough_to_ship():
    assert _native.LIBRARY.stat().st_size < WHEEL_BYTES
    assert (ROOT / "requirements-cuda.txt").exists()
