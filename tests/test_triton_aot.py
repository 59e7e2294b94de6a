"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU: what they take of each.

`launch` is replaced by a recorder and the ops run on meta tensors, so what is compiled is exactly what a call with
these shapes would launch.  Where conftest.py turns the interpreter on, the compiler runs in a process of its own; run
`TRITON_INTERPRET=0 python -m pytest -rA tests/test_triton_aot.py` to see it test by test, with the table of budgets.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from effens_kernels.ops import triton_engine as engine  # noqa: E402
from effens_kernels.ops._activations import ACTIVATIONS, saves_preactivation  # noqa: E402
from effens_kernels.ops.grouped_linear import triton as grouped_linear  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block may take
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PARKED = 32  # bytes: ptxas keeps a few values that only the epilogue needs on the stack, for occupancy


# ------------------------------------------------------------------------------------------------ what is launched


class Launch(NamedTuple):
    plan: engine.Plan
    tensors: tuple[torch.Tensor | None, ...]

    @property
    def name(self) -> str:
        return self.plan.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def tile(self) -> engine.Tile:
        return engine.Tile(*(self.plan.switches[name] for name in engine.Tile._fields))

    def changed(self, **switches: object) -> Launch:
        return Launch(self.plan._replace(switches={**self.plan.switches, **switches}), self.tensors)


@dataclass(frozen=True)
class Call:
    """One forward and backward of grouped_linear, on meta tensors."""

    members: int
    batch: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = "gelu"
    shared: bool = False
    bias: bool = True
    tf32: bool = False
    weight_inner: bool = False  # stored [E, I, O]
    far: bool = False  # rows of x so far apart that offsets within a tile take 64 bits
    need: tuple[bool, bool, bool] = field(default=(True, True, True))

    def __str__(self) -> str:
        words = [
            TYPES[self.dtype] + "_tf32" * self.tf32,
            f"E{self.members}",
            f"B{self.batch}",
            f"I{self.inputs}",
            f"O{self.outputs}",
            str(self.activation),
        ]
        words += ["shared"] * self.shared + ["nobias"] * (not self.bias) + ["w_inner"] * self.weight_inner
        words += ["far"] * self.far
        return "-".join(words)

    def launches(self, capability: int) -> tuple[list[Launch], list[Launch]]:
        """(forward, backward) on a GPU of that compute capability."""
        recorded: list[Launch] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouped_linear, "launch", lambda plan, *tensors: recorded.append(Launch(plan, tensors)))
            patch.setattr(grouped_linear, "capability", lambda device: capability)
            patch.setattr(grouped_linear, "precision", lambda dtype: "tf32" if self.tf32 else "ieee")
            empty = functools.partial(torch.empty, dtype=self.dtype, device="meta")
            x = empty((self.batch, self.inputs) if self.shared else (self.members, self.batch, self.inputs))
            weight = (
                empty(self.members, self.inputs, self.outputs).mT
                if self.weight_inner
                else empty(self.members, self.outputs, self.inputs)
            )
            if self.far:
                x = torch.empty_strided(x.shape, (1 << 40, 1 << 23, 1), dtype=self.dtype, device="meta")
            bias = empty(self.members, self.outputs) if self.bias else None
            y, z = grouped_linear.fwd(x, weight, bias, self.activation, saves_preactivation(self.activation))
            forward = len(recorded)
            saved = {"nothing": x.new_empty(0), "output": y, "preactivation": z}[ACTIVATIONS[self.activation].saves]
            grads = grouped_linear.bwd(empty(y.shape), x, weight, saved, self.activation, *self.need)
        for grad, like, needed in zip(grads, (x, weight, bias), self.need, strict=True):
            assert grad.shape == (like.shape if needed else (0,))
        return recorded[:forward], recorded[forward:]


# ------------------------------------------------------------------------------------------------ what it takes


class Budget(NamedTuple):
    registers: int
    stack: int
    spills_in_loops: int
    shared_memory: int
    instructions: dict[str, int]  # of the PTX


def specialize(launch: Launch) -> ASTSource:
    """What Triton's launcher compiles for these arguments: None and 1 become constants, multiples of 16 are marked."""
    plan = launch.plan
    values = dict(zip(plan.kernel.arg_names, (*launch.tensors, *plan.scalars))) | plan.switches
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(plan.kernel.params):
        value, free = values[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (not isinstance(value, torch.Tensor) and value == 1 and not free):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not free):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(plan.kernel, signature, constants, attributes)


_compiled: dict[tuple, Budget] = {}


def compile_for(launch: Launch, capability: int) -> Budget:
    source = specialize(launch)
    options = {name: launch.plan.switches[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    key = source.hash(), capability, *options.values()
    if key not in _compiled:
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        usage = run_tool("cuobjdump", "-res-usage", kernel.asm["cubin"])
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
        in_loops = spills_in_loops(run_tool("nvdisasm", "-c", kernel.asm["cubin"])) if stack + local else 0
        ptx = kernel.asm["ptx"]
        counts = {
            name: len(re.findall(pattern, ptx))
            for name, pattern in (
                ("mma", r"\bmma\.sync"),
                ("wgmma", r"\bwgmma\.mma_async"),
                ("tcgen05", r"\btcgen05\.mma"),
                ("fma", r"\bfma\.rn(\.\w+)*\.f32"),
                ("async_copy", r"\bcp\.async\.c"),
            )
        }
        _compiled[key] = Budget(registers, stack + local, in_loops, kernel.metadata.shared, counts)
    return _compiled[key]


def run_tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def spills_in_loops(sass: str) -> int:
    """How many loads and stores of the local stack lie on a cycle of the control flow."""
    names, after, spills, block = {}, [set()], [0], 0  # block names; successors (names or numbers) and spills by block
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_]+)(.*);", line)
        target = re.search(r"`\((\.L_\w+)\)", line) if instruction else None
        if instruction and instruction[2] in ("LDL", "STL"):
            spills[block] += 1
        ends = instruction and instruction[2] in ("BRA", "EXIT") and not instruction[1] and "P" not in instruction[3]
        if target:
            after[block].add(target[1])
        if label or target or ends:
            after, spills, block = [*after, set()], [*spills, 0], block + 1
            if not ends:
                after[block - 1].add(block)
        if label:
            names[label[1]] = block

    def returns(start: int) -> bool:
        seen, pending = set(), [start]
        while pending:
            for successor in after[pending.pop()]:
                number = names.get(successor, successor)
                if number == start:
                    return True
                if number not in seen and isinstance(number, int):
                    seen.add(number)
                    pending.append(number)
        return False

    return sum(count for block, count in enumerate(spills) if count and returns(block))


def excesses(launch: Launch, capability: int) -> list[str]:
    """What this launch takes too much of, or lacks; prints its budget."""
    budget, tile = compile_for(launch, capability), launch.tile
    tensor = launch.tensors[0]
    computes = launch.name != "grouped_linear_wgrad" or launch.tensors[3] is not None
    print(
        f"{launch.name:22} sm_{capability} {TYPES[tensor.dtype]} {launch.plan.switches['PRECISION']} "
        f"{launch.plan.switches['ACTIVATION']!s:5} tile {tile.BLOCK_M:3}x{tile.BLOCK_N:3}x{tile.BLOCK_K:3} "
        f"warps {tile.num_warps} stages {tile.num_stages} | registers {budget.registers:3} stack {budget.stack:2} "
        f"shared {budget.shared_memory >> 10:3} KB | "
        + " ".join(f"{name} {count}" for name, count in budget.instructions.items() if count)
    )
    found = []
    if budget.spills_in_loops or budget.stack > PARKED:
        found.append(f"spills: {budget.spills_in_loops} in loops, {budget.stack} bytes of stack")
    if budget.registers > 255:
        found.append(f"{budget.registers} registers")
    if budget.shared_memory > SHARED_MEMORY[capability]:
        found.append(f"{budget.shared_memory} bytes of shared memory")
    tensor_cores = {"mma": 80, "wgmma": 90, "tcgen05": 100}
    used = {name for name in tensor_cores if budget.instructions[name]}
    if tensor.dtype == torch.float32 and launch.plan.switches["PRECISION"] == "ieee":
        if used:
            found.append(f"float32 goes through {used}")
    elif computes:
        # Below 64 rows neither wgmma nor tcgen05 applies.
        wanted = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma") if tile.BLOCK_M >= 64 else "mma"
        if wanted not in used:
            found.append(f"no {wanted}, but {used or 'no tensor core instruction'}")
    return [f"{launch.name} {tile} on sm_{capability}: {problem}" for problem in found]


# ------------------------------------------------------------------------------------------------ tests

# Each reaches another row of the table of tiles in at least one kernel; the odd ones load element by element.
HUGE, LARGE, MEDIUM, SMALL = (4, 4096, 4096, 4096), (1, 2048, 2048, 2048), (1, 1024, 1024, 1024), (4, 256, 256, 256)
FEW_OUTPUTS, FEW_INPUTS, FEW_ROWS, TINY = (
    (64, 1024, 1024, 16),
    (64, 1024, 16, 1024),
    (64, 8, 1024, 1024),
    (3, 8, 16, 16),
)
ODD, ODD_SMALL, ODD_FEW_OUTPUTS = (1, 1025, 1023, 1021), (4, 255, 257, 259), (64, 1001, 1023, 5)
SHARED = Call(20, 4096, 512, 80, shared=True)
FLOAT, HALF = torch.float32, torch.float16


def calls(capability: int, *sizes: tuple[int, int, int, int], **options: Any) -> list[tuple[int, Call]]:
    return [(capability, Call(*size, **options)) for size in sizes]


CALLS = [
    *calls(90, LARGE, MEDIUM, SMALL, ODD),  # gelu: takes the most registers, and the most time to compile
    *calls(90, FEW_INPUTS, TINY, ODD_SMALL, activation="relu"),
    *calls(90, FEW_OUTPUTS, ODD_FEW_OUTPUTS, activation="relu", need=(False, True, True)),
    *calls(90, FEW_ROWS, activation="relu", need=(True, False, False)),
    *calls(90, HUGE, activation=None),
    *calls(90, LARGE, MEDIUM, ODD, dtype=FLOAT),
    *calls(90, SMALL, ODD_SMALL, dtype=FLOAT, activation="relu"),
    *calls(90, FEW_OUTPUTS, FEW_ROWS, TINY, dtype=FLOAT, activation="relu", need=(False, False, True)),
    *calls(90, LARGE, ODD, dtype=FLOAT, tf32=True),
    *calls(90, MEDIUM, dtype=HALF, activation="relu"),
    *calls(90, SMALL, activation="tanh", need=(True, False, False)),
    *calls(90, LARGE, weight_inner=True, need=(True, False, False)),
    *calls(90, SMALL, far=True, activation="relu"),
    *calls(90, (1, 1, 1, 1), activation="silu"),  # Triton turns every argument that is 1 into a constant
    *calls(90, (3, 5, 1, 7), activation="tanh", bias=False, need=(True, True, False)),
    (90, SHARED),
    (90, replace(SHARED, outputs=10, bias=False, need=(True, True, False))),
    *(pair for c in (80, 100) for pair in calls(c, LARGE, MEDIUM, ODD)),
    *(pair for c in (80, 100) for pair in calls(c, HUGE, activation=None)),
    *calls(80, LARGE, dtype=FLOAT),
    *(pair for c in (80, 100) for pair in calls(c, LARGE, dtype=FLOAT, tf32=True, activation="relu")),
    *(pair for c in (86, 120) for pair in calls(c, LARGE, activation="relu")),  # less shared memory
    (80, SHARED),
]


class TestCompiled:
    __test__ = not INTERPRETING

    @pytest.mark.parametrize(("capability", "call"), CALLS, ids=[f"sm_{c}-{call}" for c, call in CALLS])
    def test_budgets(self, capability: int, call: Call) -> None:
        problems = [
            problem
            for launches in call.launches(capability)
            for launch in launches
            for problem in excesses(launch, capability)
        ]
        assert not problems, "\n".join(problems)

    def test_a_kernel_that_spills_is_caught(self) -> None:
        (launch,), _ = Call(1, 1024, 1024, 1024, dtype=torch.float32, activation="relu").launches(90)
        crowded = launch.changed(num_warps=1)
        assert any("spills" in problem and " 0 in loops" not in problem for problem in excesses(crowded, 90))

    def test_float32_uses_tensor_cores_only_with_tf32(self) -> None:
        for tf32 in (False, True):
            (launch,), _ = Call(1, 1024, 1024, 1024, dtype=torch.float32, tf32=tf32).launches(90)
            assert bool(compile_for(launch, 90).instructions["wgmma"]) == tf32


@pytest.mark.skipif(not INTERPRETING, reason="the tests of TestCompiled run in this process")
def test_compiled_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", __file__, "-k", "TestCompiled"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    assert run.returncode == 0
    assert f"{len(CALLS) + 2} passed" in run.stdout


@pytest.mark.parametrize("kind", list(engine.TILES))
def test_every_tile_of_the_table_is_compiled(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "tensor" else torch.float32
    launched = {
        (launch.tile.BLOCK_M, launch.tile.BLOCK_N)
        for capability, call in CALLS
        if capability == 90 and call.dtype == dtype and not call.tf32
        for launches in call.launches(capability)
        for launch in launches
    }
    assert launched == {(tile.BLOCK_M, tile.BLOCK_N) for tile in engine.TILES[kind]}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_launches(shared: bool, activation: str | None) -> None:
    """One launch forward and two backward, at most, and x reaches them as it came: not expanded, not copied."""
    for need in [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]:
        forward, backward = Call(7, 33, 20, 10, shared=shared, activation=activation, need=need).launches(90)
        assert [launch.name for launch in forward] == ["grouped_linear_fwd"]
        assert len(backward) == need[0] + (need[1] or need[2])
        largest = max(7 * 33 * 10, 7 * 33 * 20 * (not shared), 7 * 20 * 10)
        for launch in forward + backward:
            assert max(a.numel() for a in launch.tensors if a is not None) <= largest


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_empty_grid(capability: int) -> None:
    for sizes in ((0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0), (0, 0, 0, 0)):
        for shared in (False, True):
            for launches in Call(*sizes, shared=shared).launches(capability):
                assert all(launch.plan.programs > 0 for launch in launches)


def test_wide_offsets() -> None:
    """Strides that could overflow 32 bits within a tile are noticed; large members alone are not such."""
    assert not engine.Layout.of(8192, 8192, (8192 * 8192, 8192, 1)).wide
    assert engine.Layout.of(64, 64, (64, 1 << 22, 1)).wide
    assert engine.Layout.of(64, 64, (64, 1, 1 << 22)).wide
    assert engine.Layout.of(64, 64, (128, 64, 1), (0, 1, 64)).aligned
    assert not engine.Layout.of(64, 64, (128, 65, 1)).aligned
    assert not engine.Layout.of(64, 10, (128, 64, 1)).aligned
