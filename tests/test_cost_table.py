"""examples/cost_table.py: every method trains and predicts, and what must be equal is."""

from __future__ import annotations

import importlib

import pytest
import torch
from common import ROOT, run_python

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)


@pytest.fixture
def table(monkeypatch):
    """The example as a module; as a program it finds what it imports beside itself."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("cost_table")


@pytest.fixture
def data(table):
    return table.load("digits", ROOT, 0)


def run(table, data, name: str, **settings):
    torch.manual_seed(0)
    return table.METHODS[name].run(data, table.Settings(**{"hidden": 16, "epochs": 2, "members": 3} | settings))


def test_every_method_learns(table, data):
    for name in table.METHODS:
        trained = run(table, data, name, hidden=64, epochs=6)
        with torch.inference_mode():
            logits = trained.predict(data.x_test)
        assert logits.dim() == 3
        assert logits.shape[1:] == (len(data.y_test), 10)
        assert table.ek.metrics.accuracy(logits, data.y_test) > 0.6, name
        assert trained.seconds > 0
        assert trained.kept > 0
        assert trained.peak > 0


def test_one_epoch_is_one(table, data):
    for name in ("single network", "SWAG"):
        ticks = []
        run(table, data, name, epochs=1, tick=lambda ticks=ticks: ticks.append(1))
        assert len(ticks) == 1, name


def test_a_batch_of_fewer_rows_than_members(table, data):
    rest = len(data.y_train) % 128
    for name in ("BatchEnsemble, batch split", "Masksembles"):
        trained = run(table, data, name, members=rest + 1, epochs=1)
        assert trained.predict(data.x_test).isfinite().all(), name


def test_a_loop_and_a_stack_are_one_ensemble(table, data):
    loop, stack = (run(table, data, f"standard ensemble{how}") for how in (", a loop", ""))
    with torch.inference_mode():
        torch.testing.assert_close(stack.predict(data.x_test), loop.predict(data.x_test), rtol=1e-3, atol=1e-3)
    assert stack.kept == loop.kept


def test_costs_are_counted(table, data):
    single, three = run(table, data, "single network"), run(table, data, "standard ensemble")
    parameters = 4 * (64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10)
    assert single.kept == parameters
    assert three.kept == 3 * parameters
    assert single.peak > 4 * parameters  # parameters, gradients, two averages; and activations
    assert run(table, data, "SWAG").kept > 3 * parameters


def test_shifted_images(table, data):
    from image_data import shifted

    torch.testing.assert_close(shifted(data, 0.0, 0), data.x_test)
    strong = shifted(data, 1.0, 0)
    assert strong.shape == data.x_test.shape
    assert strong.abs().max() <= 1.0
    assert torch.equal(strong, shifted(data, 1.0, 0))
    assert (strong - data.x_test).square().mean() > (shifted(data, 0.3, 0) - data.x_test).square().mean() > 0.0


def test_program(tmp_path):
    output = tmp_path / "table.png"
    options = ["--epochs=1", "--seeds=1", "--hidden=16", "--methods", "SWAG", "MIMO", f"--output={output}"]
    done = run_python(
        f"import runpy, sys; sys.path.insert(0, 'examples'); sys.argv = ['cost_table', *{options}]; "
        "runpy.run_path('examples/cost_table.py', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert "What ensembles cost" in done.stdout
    lines = output.with_suffix(".md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| single network", "| SWAG", "| MIMO"]
    assert lines[2].split(" | ")[1:5] == ["1.00"] * 4
    assert len({line.count("|") for line in lines}) == 1
    assert output.stat().st_size > 10_000
