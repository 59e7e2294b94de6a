"""The GPU report without a GPU: parts run, resume and merge, and what fails is seen and sets the exit status."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from time import perf_counter

import pytest
import torch
from common import ROOT, Runner

from bench.contestants import Problem, batchensemble, ensemble_mlp, grouped_linear, mix_templates, mixture_linear
from bench.contestants.base import check_equal, results
from bench.gpu import bench, dispatch_table, goals, launch, parts, report, routed, store, suite
from bench.gpu.__main__ import main
from bench.gpu.context import Context, IncompleteError, PartError, UnavailableError
from bench.gpu.families import FAMILIES, each_column
from bench.gpu.precision import PRECISIONS
from bench.gpu.sweep import run_bucket
from bench.graphs import graphed
from bench.runner import Lineup
from bench.timing import measure
from effens_kernels import _dispatch
from effens_kernels.ops.mixture_linear import routes

pytest.importorskip("rich", reason="the report's tables need rich")
FAST = ["ceilings"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command with a folder of its own; returns its exit status and what it printed."""
    monkeypatch.setattr(report, "_plots", lambda records, path: ([], "left out by the test"))

    def call(*arguments: str, names: list[str] = FAST) -> tuple[int, str]:
        status = main(["--dry", "--output", str(tmp_path), "--part", *names, *arguments])
        return status, capsys.readouterr().out

    return call


@pytest.fixture
def instead(monkeypatch):
    """Runs a function instead of the processes of parts: function(context, *arguments of the part)."""

    def replace(function) -> list[str]:
        begun = []

        def fake(part, where, device, seconds, *options):
            begun.append(part.name)
            before = (where.load(part) or {}).get("data", {}) if part.resumes else {}
            record = {"status": "passed", "reason": "", "seconds": 0.0, "date": store.now(), "data": before}
            try:
                function(part, Context(device, seconds, None, record, compile=False))
            except PartError as error:
                record |= {"status": error.status, "reason": str(error)}
            where.save(part, record)
            return record

        monkeypatch.setattr("bench.gpu.__main__.launch", fake)
        return begun

    return replace


def the_report(folder) -> dict:
    (path,) = folder.glob("*/report-*.json")
    return json.loads(path.read_text())


def test_a_part_runs_is_skipped_and_runs_again(run, tmp_path):
    status, said = run()
    assert status == 0, said
    assert "ceilings: passed" in said
    found = the_report(tmp_path)
    assert found["status"]["ceilings"] == "passed"
    assert found["status"]["build"] == "not run"
    assert found["parts"]["ceilings"]["data"]["copy"]["TB/s"] > 0
    assert found["provenance"]["versions"]["torch"]
    assert found["provenance"]["commit"]
    assert run("--list")[0] == 0
    before = found["parts"]["ceilings"]["date"], found["parts"]["ceilings"]["seconds"]
    status, said = run()
    assert status == 0
    assert "ceilings: passed after" not in said
    again = the_report(tmp_path)["parts"]["ceilings"]
    assert (again["date"], again["seconds"]) == before


def test_a_report_is_enough_to_resume(run, tmp_path, instead):
    begun = instead(lambda part, context: context.data.update(note="measured"))
    assert run()[0] == 0
    (record,) = tmp_path.glob("*/parts/ceilings.json")
    record.unlink()
    status, said = run()
    assert status == 0
    assert "taken from an earlier report: ceilings" in said
    assert begun == ["ceilings"]
    assert run("--again")[0] == 0
    assert begun == ["ceilings", "ceilings"]


def test_a_record_holds_for_its_sources_device_and_torch(tmp_path):
    part = parts.PARTS["ceilings"]
    here = store.Store(tmp_path, "a device", "2.11")
    here.save(part, {"status": "passed"})
    assert here.load(part)
    assert store.Store(tmp_path, "another", "2.11").load(part) is None
    assert store.Store(tmp_path, "a device", "2.12").load(part) is None
    here.save(part, {"status": "passed", "key": {**here.key(part), "sources": "others"}})
    assert here.load(part) is None


@pytest.mark.parametrize("error", [PartError, UnavailableError, IncompleteError])
def test_what_did_not_pass_is_shown_with_its_reason(error, run, instead, tmp_path):
    def fail(part, context):
        raise error("of this reason")

    instead(fail)
    status, said = run()
    assert status == 1
    assert "of this reason" in said
    assert the_report(tmp_path)["status"]["ceilings"] == error.status


def test_a_process_that_dies_is_a_failure(run, tmp_path, monkeypatch):
    """Before the part begins: the package does not import."""
    monkeypatch.setenv("EFFENS_CUDA_EMULATION", "/nowhere.so")
    status, said = run()
    assert status == 1
    assert "/nowhere.so does not load" in said
    assert the_report(tmp_path)["parts"]["ceilings"]["status"] == "failed"


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.0)
    part, here = parts.PARTS["ceilings"], store.Store(tmp_path, "a device", "2.11")
    record = launch.launch(part, here, "cpu", 0.05)
    assert record["status"] == "timeout"
    assert "stopped after" in here.load(part)["reason"]


def test_a_budget_begins_no_part_that_would_not_fit(run, instead):
    begun = instead(lambda part, context: None)
    status, said = run("--budget", "1")
    assert status == 1
    assert begun == []
    assert "not begun: it takes about" in said


def test_a_part_that_needs_the_extension_builds_first(run, instead):
    begun = instead(lambda part, context: None)
    assert run(names=["memcheck"])[0] == 0
    assert begun == ["build", "memcheck"]


@pytest.fixture
def without_triton(monkeypatch):
    """It is interpreted here, which takes long."""
    monkeypatch.setattr("effens_kernels._dispatch.BACKENDS", ("reference", "cpu", "cuda"))
    monkeypatch.setattr("bench.gpu.sweep.BACKENDS", {"torch": "reference", "cuda": "cuda"})


PEERS = {
    "stacked": {"Python loop", "baddbmm", "bmm + bias", "mm per member"},
    "shared": {"Python loop", "broadcast", "fold + bmm"},
    "mixed": {"sum per member", "einsum", "mm", "torch.mm"},
    "mixture": {"Python loop", "synthesis + bmm", "outputs + einsum", "torch.baddbmm"}
    | {routed.name_of(backend, route) for backend in ("cpu", "cuda") for route in ("weights", "outputs")},
    "mlp": {"Python loop", "vmap", "baddbmm chain"},
}
emulated = pytest.mark.skipif(
    not Runner("cuda").emulated, reason="the rehearsal needs the emulation of the CUDA kernels"
)


@emulated
@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_bench_parts_measure(family, run, instead, tmp_path, monkeypatch):
    names = [family.part(column) for column in family.columns]

    def measure(part, context):
        if part.name in names:
            bench.run(context, *part.arguments)

    instead(measure)
    monkeypatch.setattr(bench, "run_bucket", lambda *_: pytest.fail("no time"))
    monkeypatch.setattr(type(family), "buckets", lambda *_: [])
    assert run(names=names)[0] == 0
    found = the_report(tmp_path)
    lines = {(line["family"], line["column"], line["goal"]) for line in found["goals"]}
    assert {(family.name, "launch", "kernels, forward"), (family.name, "compute", "best peer / ours")} <= lines
    assert all(line["verdict"] in ("met", "missed", "not measured", "") for line in found["goals"])
    for name in names:
        (layer,) = found["parts"][name]["data"]["layers"].values()
        timed = {entry["name"] for entry in layer["eager"]["entries"] if entry["timing"]}
        assert PEERS[family.name] | {"effens_kernels", "effens_kernels (cuda)", "limit"} <= timed
        graphs = {entry["reason"] for entry in layer["graphed"]["entries"]}
        assert graphs <= {"CUDA graphs need a GPU", "the package tabm is not installed"}


@emulated
@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.columns[0].grid], ids=lambda f: f.name)
def test_buckets_try_backends_and_tiles(family):
    ((workload, precision),) = family.buckets(family.columns[0], rehearsal=True)
    bucket = run_bucket(family, workload, precision, "cpu", False)
    assert set(bucket["seconds"]["eager"]) == {"torch", "cuda", "cuda tile 0", "cuda tile 1", "cuda tile 2"}
    assert bucket["fastest"]["eager"]["total"] in bucket["seconds"]["eager"]
    assert [bucket[letter] for letter in "EBIO"] == [2, 4, 8, 8]
    records = {family.part(family.columns[0]): {"data": {"buckets": {"": bucket}}}}
    (row,) = dispatch_table.rows({"dispatch": report.dispatch(records)})
    assert row["op"] == family.op
    assert row["backend"] in ("reference", "cuda")


@pytest.mark.parametrize(("family", "column"), list(each_column()), ids=lambda x: x.name)
def test_families_say_what_they_measure(family, column):
    """Every row and bucket has sizes, products, bytes and a name of its own."""
    rows, buckets = family.rows(column, False), family.buckets(column, False)
    for chosen in (rows, buckets):
        assert len({bench.describe(*row) for row in chosen}) == len(chosen)
    for workload, precision in rows + buckets:
        *_, summed, _ = sizes = family.sizes(workload)  # E, B, I, O or M, T, N
        dtype, _ = PRECISIONS[precision]
        assert sum(p.flops for p in family.suite.products(workload)) == 2 * prod(sizes)
        moved = family.moved_bytes(workload, dtype)
        assert min(moved) >= prod(sizes) // summed * dtype.itemsize
        if column.name == "memory" and (workload, precision) in rows:
            assert min(moved) >= 128 << 20  # no L2 holds it
    assert len({tuple(family.sizes(workload)) + (name,) for workload, name in buckets}) == len(buckets)


@pytest.mark.parametrize("data", [False, True], ids=["features", "data"])
def test_the_bytes_of_the_shared_form_are_those_of_its_tensors(data):
    shared = FAMILIES["shared"]
    workload = replace(shared.tiny, batch=5, widths=(8, 6), model=data)
    problem = Problem(workload, torch.bfloat16, "cpu")
    contestant = batchensemble.broadcast(problem)
    x, ((weight, r, s, bias),) = contestant.arguments
    y = contestant.forward()
    contestant.backward(y, torch.ones_like(y))
    read_again = (x, weight, r, s)
    assert shared.moved_bytes(workload, problem.dtype) == (
        sum(t.nbytes for t in (x, weight, r, s, bias, y)),
        sum(t.nbytes for t in (y, *read_again, *contestant.gradients().values())),
    )


def test_peers_take_the_coefficients_of_the_mixed_form():
    """As a matrix: not of several leading axes."""
    mixed = FAMILIES["mixed"]
    assert all(len(case.leading) == 1 for column in mixed.columns for case, _ in column.layers)


def test_the_bytes_of_the_mixed_form_are_those_of_its_tensors():
    """But for the coefficients, which are few."""
    mixed = FAMILIES["mixed"]
    problem = Problem(mixed.tiny, torch.bfloat16, "cpu")
    contestant = mix_templates.mm(problem)
    _, templates = contestant.arguments
    y = contestant.forward()
    contestant.backward(y, torch.ones_like(y))
    forward, backward = mixed.moved_bytes(mixed.tiny, problem.dtype)
    assert forward == templates.nbytes + y.nbytes
    assert backward == y.nbytes + templates.nbytes + contestant.gradients()["templates"].nbytes


@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
def test_the_bytes_of_layers_of_mixed_weights_are_those_of_their_tensors(shared):
    mixture = FAMILIES["mixture"]
    case = replace(mixture.tiny, batch=5, outputs=6, shared=shared)
    problem = Problem(case, torch.bfloat16, "cpu")
    contestant = mixture_linear.synthesis(problem)
    x, coefficients, templates, bias = contestant.arguments
    y = contestant.forward()
    contestant.backward(y, torch.ones_like(y))
    assert mixture.moved_bytes(case, problem.dtype) == (
        sum(t.nbytes for t in (x, coefficients, templates, bias, y)),
        sum(t.nbytes for t in (y, x, coefficients, templates, *contestant.gradients().values())),
    )


@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
def test_routes_are_taken_forward_and_backward(shared, monkeypatch):
    """Whatever the rule says, which is back afterwards."""
    taken, route, rule = [], routes._route, _dispatch.mixture_route
    monkeypatch.setattr(routes, "_route", lambda *tensors: (taken.append(route(*tensors)), taken[-1])[1])
    monkeypatch.setattr(_dispatch, "BACKENDS", ("reference", "cpu"))
    problem = Problem(replace(FAMILIES["mixture"].tiny, shared=shared), torch.float32, "cpu")
    expected = results(mixture_linear.loop(problem))
    for contestant in routed.every_route(problem):
        check_equal(results(contestant), expected)
    assert taken == ["weights", "weights", "outputs", "outputs"]
    assert _dispatch.mixture_route is rule


@pytest.mark.parametrize(("activation", "saved"), [("relu", 1), ("gelu", 2)])
def test_the_bytes_of_perceptrons_are_those_of_their_tensors(activation, saved):
    mlp = FAMILIES["mlp"]
    case = replace(mlp.tiny, batch=5, widths=(8, 6, 4), activation=activation)
    problem = Problem(case, torch.bfloat16, "cpu")
    contestant = ensemble_mlp.chain(problem)
    x, weights, biases = contestant.arguments
    y = contestant.forward()
    contestant.backward(y, torch.ones_like(y))
    parameters = sum(t.nbytes for t in (*weights, *biases))
    hidden = saved * case.members * 5 * 6 * 2
    assert mlp.moved_bytes(case, problem.dtype) == (
        x.nbytes + parameters + hidden + y.nbytes,
        y.nbytes + x.nbytes + hidden + parameters + sum(t.nbytes for t in contestant.gradients().values()),
    )


def test_graphs_are_captured_checked_and_timed(monkeypatch):
    """The calls to CUDA in their order, on stand-ins: a graph's capture computes, its replay is counted."""
    replays = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.time - self.time)

    class Graph:
        def replay(self) -> None:
            replays.append(self)

        def pool(self) -> None:
            return None

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            pass

    stand_ins = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}
    stand_ins |= {"synchronize": lambda: None, "stream": nullcontext, "graph": lambda *_, **__: nullcontext()}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    problem = Problem(FAMILIES["stacked"].tiny, torch.float32, "cpu")
    lineup = Lineup()
    eager = lineup.admit("baddbmm", lambda: grouped_linear.baddbmm(problem))
    graph = lineup.admit("baddbmm [graph]", lambda: graphed(eager, "cuda"))
    assert graph, lineup.entries
    timings = measure(lineup.runnable, 0.01, "cuda", min_rounds=1)
    assert len(set(replays)) == 3  # forward, backward, step
    assert set(timings) == {"baddbmm", "baddbmm [graph]"}
    assert timings["baddbmm"].total.median > timings["baddbmm"].forward.median > 0


@pytest.mark.parametrize(("family", "column"), list(each_column()), ids=lambda x: x.name)
def test_an_interrupted_bench_part_keeps_its_rows(family, column):
    context = Context("cuda", 0.0, None)  # no time at all: nothing is begun, and the GPU is not touched
    rows, buckets = family.rows(column, False), family.buckets(column, False)
    context.data["layers"] = {bench.describe(*rows[0]): {}}
    with pytest.raises(IncompleteError, match=f"1 of {len(rows)} layers and 0 of {len(buckets)} buckets"):
        bench.run(context, family.name, column.name)


def entry(name: str, kind: str, milliseconds: float, note: str = "") -> dict:
    stat = {"median": milliseconds * 1e-3, "p20": 1e-3, "p80": 1e-3, "count": 1}
    timing = {"forward": stat, "backward": stat, "total": stat}
    return {"name": name, "kind": kind, "note": note, "timing": timing, "reason": ""}


def lines_of(
    family: str,
    peers: dict[str, float],
    graphed: list[dict] | None = None,
    host: dict[str, float] | None = None,
    ours: tuple[dict, ...] = (),
) -> dict[str, goals.Line]:
    """Of a layer whose limit takes 1 ms, we 2 and our Triton kernels 1, measured in every column."""
    entries = [entry(name, "peer", milliseconds) for name, milliseconds in peers.items()]
    entries += [
        entry("effens_kernels", "ours", 2.0, "backend cuda"),
        entry("effens_kernels (triton)", "backend", 1.0, "backend triton"),
        entry("limit", "limit", 1.0),
        *ours,
    ]
    row = {"suite": "s", "workload": "w", "dtype": "float32", "threads": 0, "forward_flops": 1, "backward_flops": 2}
    layer = {
        "eager": {**row, "entries": entries},
        "graphed": {**row, "entries": graphed or []},
        "case": {"members": 10, "batch": 2},
        "bytes": [2_000_000, 4_000_000],
        "counts": {"effens_kernels": {"launches": {"forward": 1, "backward": 4}, "host": {}}},
    }
    for name, microseconds in (host or {}).items():
        spent = {direction: {"median": microseconds * 1e-6} for direction in ("forward", "backward")}
        layer["counts"].setdefault(name, {"launches": {}})["host"] = spent
    records = {FAMILIES[family].part(column): {"data": {"layers": {"w": layer}}} for column in FAMILIES[family].columns}
    records["ceilings"] = {"data": {"copy": {"TB/s": 0.002}}}
    found = goals.lines(records)
    assert {line.family for line in found} == {family}
    return {line.goal: line for line in found}


def test_goals_tell_what_was_reached():
    lines = lines_of("stacked", {"Python loop": 20.0, "baddbmm": 3.0, "torch.compile": 1.5})
    assert lines["kernels, forward"].verdict == "met"
    assert lines["kernels, backward"].verdict == "missed"
    assert lines["loop / ours"].reached == {"automatic": 10.0, "cuda": 10.0, "triton": 20.0}
    assert lines["loop / ours"].verdict == "met"  # 0.8 * 10
    assert lines["best eager peer / ours"].reached["automatic"] == 1.5  # torch.compile is not one
    assert lines["best eager peer / ours"].verdict == "missed"
    assert lines["best graphed peer / ours"].verdict == "not measured"
    assert lines["of copy bandwidth, forward"].reached["automatic"] == pytest.approx(0.5)


def test_goals_of_the_shared_form():
    peers = {"Python loop": 20.0, "broadcast": 6.0, "torch.compile": 4.0, "torch.compile (max-autotune)": 2.5}
    lines = lines_of("shared", peers)
    assert (lines["kernels, forward"].target, lines["kernels, backward"].target) == (1, 3)
    assert lines["best eager peer / ours"].verdict == "met"  # 6 over 2 is 3
    assert lines["of copy bandwidth, backward"].reached["automatic"] == pytest.approx(1.0)
    assert lines["of copy bandwidth, backward"].verdict == "met"
    forward, backward = lines["ours / one product, forward"], lines["ours / two products, backward"]
    assert forward.reached == {"automatic": 2.0, "cuda": 2.0, "triton": 1.0}
    assert (forward.target, backward.target, forward.verdict) == (1.08, 1.12, "missed")
    assert lines["torch.compile / ours"].reached["automatic"] == 1.25  # the faster of the two
    assert lines["torch.compile / ours"].verdict == "missed"

    # Graphs, where there are any: the host's time does not count.
    graphed = [entry("effens_kernels", "ours", 1.05, "backend cuda"), entry("limit", "limit", 1.0)]
    lines = lines_of("shared", peers, graphed)
    assert lines["ours / one product, forward"].verdict == "met"
    assert lines["torch.compile / ours"].verdict == "not measured"
    assert lines["best eager peer / ours"].reached["automatic"] == 3.0


def test_goals_of_the_mixed_form():
    peers = {"mm": 3.0, "torch.mm": 1.5, "torch.compile": 5.0}
    host = {"effens_kernels": 17.0, "torch.mm": 10.0}
    lines = lines_of("mixed", peers, host=host)
    forward = lines["host, forward, µs (torch.mm: 10)"]
    assert forward.reached["automatic"] == pytest.approx(17.0)
    assert (forward.target, forward.verdict) == (pytest.approx(15.0), "missed")
    lines = lines_of("mixed", peers, host=host | {"effens_kernels": 9.0})
    assert lines["host, backward, µs (torch.mm: 10)"].verdict == "met"
    assert lines["kernels, backward"].reached["automatic"] == 4
    forward, backward = (lines[f"of copy bandwidth, {direction}"] for direction in ("forward", "backward"))
    assert (forward.target, backward.target) == (0.90, 0.85)
    assert (forward.verdict, backward.verdict) == ("missed", "met")  # 0.5 and 1
    assert lines["torch.mm / ours, forward"].reached["automatic"] == 0.75
    asked = {goal for goal, line in lines.items() if line.target is not None}
    assert all(goal.startswith(("host", "of copy")) for goal in asked)


def test_goals_of_layers_of_mixed_weights():
    peers = {"synthesis + bmm": 3.0, "outputs + einsum": 2.5}
    times = {("cuda", "weights"): 2.0, ("cuda", "outputs"): 1.6, ("triton", "weights"): 1.0, ("triton", "outputs"): 1.5}
    ours = tuple(entry(routed.name_of(*which), "backend", ms, ", ".join(which)) for which, ms in times.items())
    ours += (entry("torch.baddbmm", "bound", 1.5),)
    host = {"effens_kernels": 17.0, "torch.baddbmm": 10.0}
    lines = lines_of("mixture", peers, host=host, ours=ours)
    assert lines["host, forward, µs (torch.baddbmm: 10)"].verdict == "missed"
    assert lines["synthesis + bmm / ours"].reached["automatic"] == 1.5
    assert lines["synthesis + bmm / ours"].verdict == "met"
    assert lines["best peer / ours"].reached["automatic"] == 1.25
    assert lines["torch.baddbmm / ours"].reached["automatic"] == 0.75
    assert lines["outputs / weights"].reached == {"automatic": 0.8, "cuda": 0.8, "triton": 1.5}
    assert lines["outputs / weights, eager"].reached == lines["outputs / weights"].reached
    assert lines["ours / fastest route"].reached == {"automatic": 2.0, "cuda": 2.0, "triton": 1.0}
    assert (lines["ours / fastest route"].target, lines["ours / fastest route"].verdict) == (1.2, "missed")
    assert lines["ours / fastest route, graphed"].verdict == "not measured"

    # Torch's products: there is nothing to beat, but kernels may have been the better choice.
    graphed = [entry("effens_kernels", "ours", 2.0, "backend reference"), entry("synthesis + bmm", "peer", 2.0), *ours]
    lines = lines_of("mixture", peers, graphed, ours=ours)
    assert (lines["synthesis + bmm / ours"].target, lines["synthesis + bmm / ours"].reached["automatic"]) == (None, 1.0)
    assert lines["outputs / weights"].reached["automatic"] is None
    assert lines["ours / fastest route"].verdict == "missed"


def test_goals_of_perceptrons():
    graphed = [entry("effens_kernels", "ours", 0.5, "backend cuda"), entry("baddbmm chain", "peer", 2.0)]
    lines = lines_of("mlp", {"Python loop": 30.0, "baddbmm chain": 8.0}, graphed)
    assert lines["graphed chain / ours"].reached["automatic"] == 4.0
    assert lines["graphed chain / ours"].verdict == "met"
    assert lines["eager loop / ours"].reached["automatic"] == 15.0
    assert lines["kernels, backward"].target == 2
    assert lines["of the roofline, forward"].target == 0.5


def test_failed_tests_are_named(tmp_path):
    results = tmp_path / "results.xml"
    results.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
        '</testcase><testcase classname="a" name="left out"><skipped message="no GPU"/></testcase></testsuite>'
        "</testsuites>"
    )
    counts = suite._counts(results)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert counts["failures"] == ["a::bad"]
    assert counts["reasons of skips"] == ["no GPU"]


def test_shards_cover_every_test_once():
    from bench.gpu.shard import pytest_collection_modifyitems as keep

    class Config:
        class hook:
            pytest_deselected = staticmethod(lambda items: None)

        def __init__(self, shard: str) -> None:
            self.shard = shard

        def getoption(self, name: str) -> str:
            return self.shard

    kept = []
    for n in (1, 2, 3):
        items = list(range(10))
        keep(Config(f"{n}/3"), items)
        kept += items
    assert kept == list(range(10))


def test_every_part_is_documented():
    """By its name, or as one of a row: `tests-triton-1` to `-3`; `bench-shared-launch`, `-memory`."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    for name in parts.PARTS:
        group, _, last = name.rpartition("-")
        assert any(f"`{name}`" in row or (f"`{group}-" in row and f"`-{last}`" in row) for row in rows), name
