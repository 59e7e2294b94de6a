"""Fresh random data for every run, and everything that can run an op on this machine."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import pytest
import torch

# Without a GPU, the kernels run on the CPU: Triton's in its interpreter (set before any is decorated; tests that need
# the real compiler start a process of their own), CUDA C++ in the emulation that `make emulation` builds.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    emulation = Path(__file__).resolve().parent.parent / "build" / "cmake" / "effens_cuda_emulation.so"
    os.environ.setdefault("EFFENS_CUDA_EMULATION", str(emulation))

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores already
    torch.set_num_threads(1)

from common import RUNNERS, Runner, isas

from effens_kernels import _native


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat a run that printed this seed (default: a new one each run)")


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # one of several processes
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"random data: repeat with --seed {config.option.seed}"


@pytest.fixture
def session_seed(request) -> int:
    """Changes from run to run; for data that several tests share."""
    return request.config.option.seed


@pytest.fixture(autouse=True)
def seed(request, session_seed) -> int:
    """A seed of this test alone, which also seeds torch.randn; a failure shows how to repeat it."""
    value = zlib.crc32(f"{session_seed} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    print(f"random data: repeat with --seed {session_seed}")
    return value


@pytest.fixture(params=RUNNERS, ids=str)
def runner(request):
    """Each kernel backend that can run here, the CPU engine with each of its instruction sets."""
    yield from run_with(request.param)


@pytest.fixture(params=isas())
def isa(request):
    """Each instruction set that the CPU engine can run here."""
    yield from (running.isa for running in run_with(Runner("cpu", request.param)))


@pytest.fixture
def threads():
    """Sets the number of threads of torch and the CPU engine, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run_with(runner: Runner):
    reason = runner.why_not()
    if reason is not None:
        pytest.skip(reason)
    if runner.isa is None:
        yield runner
        return
    assert _native.available, _native.why_not()
    before = _native.ops.cpu_isa()
    _native.ops.cpu_set_isa(runner.isa)
    yield runner
    _native.ops.cpu_set_isa(before)
