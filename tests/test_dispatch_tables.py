"""Automatic choice on a GPU: by the table of measurements where there is one, else by the stated rules."""

from __future__ import annotations

import json

import pytest
import torch

import effens_kernels as ek
from bench.gpu import dispatch_table
from effens_kernels import _dispatch, _tables

GPU = "NVIDIA H200 (imagined)"
REPORT = {
    "provenance": {"device": GPU, "commit": "0123"},
    "dispatch": [
        {"E": 8, "B": 256, "I": 64, "O": 64, "precision": p, "eager": {"total": winner}, "graphed": {"total": "torch"}}
        for p, winner in [("float32", "cuda tile 1"), ("bfloat16", "triton"), ("tf32", None)]
    ]
    + [{"E": 8, "B": 1024, "I": 1024, "O": 1024, "precision": "bfloat16", "eager": {"total": "torch"}, "graphed": {}}],
}


@pytest.fixture
def imagined_gpu(monkeypatch, tmp_path):
    """A GPU of which all backends can run, with no table yet."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: GPU)
    monkeypatch.setattr(_tables, "DIRECTORY", tmp_path / "tables")
    monkeypatch.setattr(_dispatch, "why_not_here", lambda backend: None)
    monkeypatch.setattr(_dispatch, "takes_device", lambda backend: "cpu" if backend == "cpu" else "cuda")
    _tables.forget()
    yield tmp_path / "tables"
    _tables.forget()


def choose(dtype: torch.dtype, *sizes: int, op: str = "grouped_linear") -> str:
    return _dispatch.select(_dispatch.Problem(op, "cuda", dtype, sizes))


def report_of(op: str, winner: str, device: str = GPU, commit: str = "4567") -> dict:
    """Of one bucket in bfloat16."""
    bucket = {"op": op, "E": 8, "B": 1024, "I": 1024, "O": 1024, "precision": "bfloat16", "eager": {"total": winner}}
    return {"provenance": {"device": device, "commit": commit}, "dispatch": [bucket]}


def test_public_functions_ask_with_sizes(imagined_gpu, monkeypatch):
    dispatch_table.write(REPORT, imagined_gpu)
    asked = []

    def ask(problem, requested):
        asked.append(problem._replace(device="cuda"))
        return "reference"

    real = _dispatch.select
    monkeypatch.setattr(_dispatch, "selects", lambda *_: False)  # not the short route of CPU tensors
    monkeypatch.setattr(_dispatch, "select", ask)
    x, weight = torch.randn(10, 200, 50, dtype=torch.bfloat16), torch.randn(10, 96, 50, dtype=torch.bfloat16)
    ek.grouped_linear(x, weight)
    assert asked[0].sizes == (10, 200, 50, 96)
    assert real(asked[0]) == "triton"
    ek.grouped_linear(x[0], weight)
    assert asked[1].sizes == (10, 200, 50, 96)
    ek.rank1_linear(x, weight[0], torch.ones_like(x[:, 0]), torch.ones_like(weight[..., 0]))
    assert asked[2].sizes == (10, 200, 50, 96)
    assert asked[2].op == "rank1_linear"


@pytest.mark.usefixtures("imagined_gpu")
def test_without_a_table():
    assert choose(torch.bfloat16, 8, 256, 64, 64) == "cuda"
    assert choose(torch.bfloat16, 8, 4096, 512, 512) == "reference"
    assert choose(torch.bfloat16, 600, 511, 4096, 4096) == "cuda"
    assert choose(torch.float64, 8, 256, 64, 64) == "reference"


@pytest.mark.usefixtures("imagined_gpu")
def test_mixing_goes_to_torch_where_arithmetic_bounds_it():
    def choose(dtype: torch.dtype, *sizes: int) -> str:
        return _dispatch.select(_dispatch.Problem("mix_templates", "cuda", dtype, sizes))

    for dtype, side in ((torch.float32, 64), (torch.bfloat16, 32)):
        assert choose(dtype, side, side, 10**6) == "reference"
        assert choose(dtype, side - 1, side, 10**6) == "cuda"
        assert choose(dtype, 8, 4096, 10**6) == "cuda"
    assert choose(torch.float32, 0, 64, 10**6) == "cuda"
    assert choose(torch.float64, 4, 4, 10**6) == "reference"


def test_with_the_table_of_a_report(imagined_gpu):
    path = dispatch_table.write(REPORT, imagined_gpu)
    assert json.loads(path.read_text())["provenance"] == {"grouped_linear": REPORT["provenance"]}
    assert choose(torch.float32, 8, 256, 64, 64) == "cuda"
    assert choose(torch.bfloat16, 10, 200, 50, 96) == "triton"
    assert choose(torch.bfloat16, 8, 900, 900, 900) == "reference"
    assert choose(torch.bfloat16, 1, 1, 8, 8) == "cuda", "too far from any row"
    assert choose(torch.float16, 8, 1024, 1024, 1024) == "reference", "no rows of that type: the rule"
    assert choose(torch.bfloat16, 8, 0, 64, 64) == "cuda"


@pytest.mark.parametrize(("op", "other"), [("grouped_linear", "rank1_linear"), ("rank1_linear", "grouped_linear")])
def test_each_op_has_rows_of_its_own(op, other, imagined_gpu):
    dispatch_table.write(report_of(op, "triton"), imagined_gpu)
    assert choose(torch.bfloat16, 8, 900, 900, 900, op=op) == "triton"
    assert choose(torch.bfloat16, 8, 900, 900, 900, op=other) == "reference", "no rows of that op: the rule"
    assert choose(torch.bfloat16, 8, 256, 64, 64, op=other) == "cuda"
    dispatch_table.write(report_of(other, "cuda tile 2", commit="89ab"), imagined_gpu)
    _tables.forget()
    assert choose(torch.bfloat16, 8, 900, 900, 900, op=op) == "triton", "another op's report leaves it"
    assert choose(torch.bfloat16, 8, 900, 900, 900, op=other) == "cuda"
    (path,) = imagined_gpu.iterdir()
    assert {op: facts["commit"] for op, facts in json.loads(path.read_text())["provenance"].items()} == {
        op: "4567",
        other: "89ab",
    }
    dispatch_table.write(report_of(op, "torch"), imagined_gpu)
    _tables.forget()
    assert choose(torch.bfloat16, 8, 900, 900, 900, op=op) == "reference", "its own report replaces it"


def test_a_table_made_before_there_were_several_ops(imagined_gpu):
    dispatch_table.write(report_of("grouped_linear", "triton"), imagined_gpu)
    (path,) = imagined_gpu.iterdir()
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "provenance": before["provenance"]["grouped_linear"]}))
    assert choose(torch.bfloat16, 8, 900, 900, 900) == "triton"
    assert choose(torch.bfloat16, 8, 900, 900, 900, op="rank1_linear") == "reference"
    dispatch_table.write(report_of("rank1_linear", "cuda"), imagined_gpu)
    _tables.forget()
    assert choose(torch.bfloat16, 8, 900, 900, 900) == "triton"
    assert json.loads(path.read_text())["provenance"]["grouped_linear"] == before["provenance"]["grouped_linear"]


def test_gpus_have_tables_of_their_own(imagined_gpu):
    dispatch_table.write(report_of("rank1_linear", "cuda"), imagined_gpu)
    dispatch_table.write(report_of("rank1_linear", "triton", device="another GPU"), imagined_gpu)
    assert choose(torch.bfloat16, 8, 900, 900, 900, op="rank1_linear") == "cuda"
    assert len(list(imagined_gpu.iterdir())) == 2


def test_a_table_cannot_choose_what_does_not_run(imagined_gpu, monkeypatch):
    dispatch_table.write(REPORT, imagined_gpu)
    monkeypatch.setattr(_dispatch, "why_not_here", lambda backend: "no" if backend == "triton" else None)
    assert choose(torch.bfloat16, 8, 256, 64, 64) == "cuda"


def test_an_argument_overrides(imagined_gpu):
    dispatch_table.write(REPORT, imagined_gpu)
    problem = _dispatch.Problem("grouped_linear", "cuda", torch.bfloat16, (8, 256, 64, 64))
    assert _dispatch.select(problem, "reference") == "reference"


def test_compiled_code_takes_the_choice_as_a_constant(monkeypatch):
    """What is asked of the GPU cannot be traced; sizes may be symbols."""
    name = "effens_kernels_cuda::grouped_linear_fwd"

    def untraceable() -> str | None:
        return None if isinstance(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), bool) else "never"

    def function(x):
        sizes = 8, x.shape[0], 64, 64
        chosen = _dispatch.select(_dispatch.Problem("grouped_linear", "cuda", x.dtype, sizes))
        mixing = _dispatch.select(_dispatch.Problem("mix_templates", "cuda", x.dtype, (x.shape[0], 4, 64)))
        return x + len(chosen) + len(mixing)

    monkeypatch.setattr(_dispatch, "_why_not_cuda", untraceable)
    monkeypatch.setattr(_dispatch, "takes_device", lambda backend: "cuda")
    _dispatch._why_not_here.cache_clear()
    try:
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
        assert compiled(torch.zeros(5)).eq(2 * len("cuda")).all()
        assert compiled(torch.zeros(7)).eq(2 * len("cuda")).all()
    finally:
        _dispatch._why_not_here.cache_clear()
