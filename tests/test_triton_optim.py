"""The Triton kernels of the optimizers' steps compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU.

Their values are those of tests/test_optim.py, in the interpreter.  Where conftest.py turns that on, the compiler runs
in a process of its own, as in tests/test_triton_aot.py.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from common import run_python
from triton_budgets import Launch, compile_for

from effens_kernels.ops.optimizer_step import triton as steps

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def launches(kind: str, dtype: torch.dtype, shape: tuple[int, ...], members: int) -> list[Launch]:
    """What a step with all states launches, recorded on meta tensors."""
    recorded: list[Launch] = []
    param, *others = ([torch.empty(shape, dtype=dtype, device="meta")] for _ in range(5))
    table = torch.empty(1, members, 7 if kind == "sgd" else 9, dtype=torch.float64, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "launch", lambda plan, *tensors: recorded.append(Launch(plan, tensors)))
        if kind == "sgd":
            steps.sgd_step_(param, *others[:2], table, True)
        else:
            steps.adamw_step_(param, *others, table)
    return recorded


@pytest.mark.skipif(INTERPRETING, reason="in a process of its own")
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [(torch.float32, 80), (torch.float32, 90), (torch.float32, 100), (torch.bfloat16, 90)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_compiled(kind, dtype, capability):
    """A program's 1024 numbers are 8 of each of its 128 threads: all of them are in registers at once."""
    (launch,) = launches(kind, dtype, (4, 512, 256), 4)
    budget = compile_for(launch, capability)
    assert budget.registers <= 96
    assert budget.stack == 0
    assert budget.shared_memory == 0


@pytest.mark.skipif(not INTERPRETING, reason="the tests above run in this process")
def test_compiled_in_a_process_of_its_own():
    arguments = ["-q", "-p", "no:cacheprovider", "tests/test_triton_optim.py", "-k", "test_compiled and not process"]
    done = run_python(f"import sys, pytest; sys.exit(pytest.main({arguments}))", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "8 passed" in done.stdout


def test_launches():
    """One for each parameter that has numbers; a shared one is one row of any shape."""
    (launch,) = launches("adamw", torch.float32, (4, 100, 33), 4)
    assert launch.plan.programs == 4 * 4
    assert launch.plan.scalars == (3300, *(3300,) * 5)
    (launch,) = launches("sgd", torch.float32, (100, 33), 1)
    assert launch.plan.programs == 4
    assert launch.plan.scalars == (3300, 0, 0, 0)
    assert launches("sgd", torch.float32, (4, 0), 4) == []
