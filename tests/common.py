"""What the tests share besides effens_kernels.testing: what runs ops here, gradients by name, other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from effens_kernels import _dispatch, _env, _native
from effens_kernels.testing import KERNEL_BACKENDS, OPS, Case, Op

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------- what runs here


def isas() -> list[str]:
    """Instruction sets of the CPU engine; one stand-in where the extension is missing, which fails with the reason."""
    return _native.ops.cpu_isa_supported().split(",") if _native.available else ["missing"]


class Runner(NamedTuple):
    """A backend and, for the CPU engine, an instruction set."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        where = "interpreter" if self.interpreted else "emulation" if self.emulated else None
        return "-".join(filter(None, (self.backend, self.isa, where)))

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and _dispatch.interpreting()

    @property
    def emulated(self) -> bool:
        return self.backend == "cuda" and _native.emulates_cuda

    @property
    def slow(self) -> bool:
        """Milliseconds or more per tile."""
        return self.interpreted or self.emulated

    @property
    def device(self) -> str:
        return "cpu" if self.backend == "reference" else _dispatch.takes_device(self.backend)

    def why_not(self) -> str | None:
        """Why it is right that this runner does not run here.  A missing extension is right only by request."""
        if self.backend == "cpu":
            return _native.why_not() if _env.get("EFFENS_NATIVE") == "0" else None
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA GPU"
        return _dispatch.why_not_here(self.backend)

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        # An op that is made of grouped_linear has no row of its own.
        table = _dispatch.IMPLEMENTED.get(op, _dispatch.IMPLEMENTED["grouped_linear"])
        return table.get(self.backend, ())


def _runners() -> list[Runner]:
    implemented = [b for b in KERNEL_BACKENDS if any(b in row for row in _dispatch.IMPLEMENTED.values())]
    return [Runner(b, isa) for b in implemented for isa in (isas() if b == "cpu" else [None])]


RUNNERS = _runners()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def runs(*dtypes: torch.dtype, op: str = "grouped_linear") -> list:
    """(dtype, runner) for each that can; of Triton's interpreter, which is slow, the first dtype alone."""
    return [
        pytest.param(dtype, runner, id=f"{name_of(dtype)}-{runner}")
        for dtype in dtypes
        for runner in RUNNERS
        if dtype in runner.dtypes(op) and (dtype == dtypes[0] or not runner.interpreted)
    ]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process with none of the package's variables set but those given."""
    inherited = {name: value for name, value in os.environ.items() if name not in _env.VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**inherited, **environment}, cwd=ROOT, capture_output=True, text=True)


# -------------------------------------------------------------------------------------------------- gradients

Named = dict[str, Tensor]
ARGUMENTS = {len(op.arguments): op.arguments for op in OPS.values()}  # names, by how many tensors a call takes


def leaves(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values and strides, cut off and with requires_grad."""
    return [None if t is None else t.detach().requires_grad_() for t in inputs]


def derivatives(call: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, **options) -> Named:
    """{"y": ..., "x": dL/dx, "weight": ..., "bias": ...} for dL/dy = grad; no bias where the input has none."""
    inputs = leaves(inputs)
    y = call(*inputs, **options)
    named = {name: t for name, t in zip(ARGUMENTS[len(inputs)], inputs) if t is not None}
    return {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), grad)))}


class Sample(NamedTuple):
    """One sample call with its oracle."""

    inputs: tuple[Tensor | None, ...]
    grad: Tensor
    exact: Named  # float64, on the same (rounded) values
    composition: Named  # PyTorch's own operations in the dtype of the inputs


def output_shape(op: Op, inputs: Sequence[Tensor | None], options: dict) -> torch.Size:
    return op.reference(*(None if t is None else t.to("meta") for t in inputs), **options).shape


@lru_cache(maxsize=4)  # tests run the backends of one sample in a row
def sample(op: str, case: Case, dtype: torch.dtype, device: str, seed: int) -> Sample:
    call = OPS[op].reference
    inputs = case.inputs_for(dtype, device, seed)
    shape = output_shape(OPS[op], inputs, case.options())
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    wide = [None if t is None else t.double() for t in inputs]
    if case.activation == "relu":  # near its kink, rounding decides which of two derivatives is right
        z = call(*wide, **{**case.options(), "activation": None})
        if z.numel():
            near = z.abs() < 8 * torch.finfo(dtype).eps * z.abs().max()
            grad = grad.masked_fill(near, 0)
    return Sample(
        inputs,
        grad,
        derivatives(call, wide, grad.double(), **case.options()),
        derivatives(call, inputs, grad, **case.options()),
    )
