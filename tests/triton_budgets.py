"""What a launch of a Triton kernel would compile to, ahead of time and without a GPU, and what that takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effens_kernels.ops import triton_engine as engine

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block may take
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
PARKED = 32  # bytes: ptxas keeps a few values that only the epilogue needs on the stack, for occupancy


class Launch(NamedTuple):
    plan: engine.Plan
    tensors: tuple[torch.Tensor | None, ...]

    @property
    def name(self) -> str:
        return self.plan.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def tile(self) -> engine.Tile:
        return engine.Tile(*(self.plan.switches[name] for name in engine.Tile._fields))

    @property
    def multiplies(self) -> bool:
        """False for launches that only add: parts, or a gradient's rows for db alone."""
        results = {
            "grouped_linear_wgrad": slice(3, 4),
            "indexed_linear_wgrad": slice(6, 7),
            "ragged_linear_wgrad": slice(4, 5),
            "rank1_linear_wgrad": slice(6, 9),
        }.get(self.name, slice(None))
        return "PRECISION" in self.plan.switches and any(tensor is not None for tensor in self.tensors[results])

    def changed(self, **switches: object) -> Launch:
        return Launch(self.plan._replace(switches={**self.plan.switches, **switches}), self.tensors)


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
    budget, switches = compile_for(launch, capability), launch.plan.switches
    tensor = next(tensor for tensor in launch.tensors if tensor is not None)
    blocks = "x".join(f"{size:3}" for name, size in switches.items() if name.startswith("BLOCK"))
    print(
        f"{launch.name:22} sm_{capability} {TYPES[tensor.dtype]} {switches.get('PRECISION')} "
        f"{switches.get('ACTIVATION')!s:5} tile {blocks} warps {switches['num_warps']} stages {switches['num_stages']} "
        f"| registers {budget.registers:3} stack {budget.stack:2} shared {budget.shared_memory >> 10:3} KB | "
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
    if tensor.dtype == torch.float32 and switches.get("PRECISION") != "tf32":
        if used:
            found.append(f"float32 goes through {used}")
    elif launch.multiplies:
        # Below 64 rows neither wgmma nor tcgen05 applies.
        wanted = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma") if switches["BLOCK_M"] >= 64 else "mma"
        if wanted not in used:
            found.append(f"no {wanted}, but {used or 'no tensor core instruction'}")
    return [f"{launch.name} {blocks} on sm_{capability}: {problem}" for problem in found]
