"""Snapshot ensembles: the schedule of the paper, snapshots where its cycles end, runs that are interrupted."""

from __future__ import annotations

import io
from math import ceil, cos, pi

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.ensembles import SnapshotEnsemble


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def sgd(model: nn.Module, lr: float | Tensor = 0.1) -> torch.optim.Optimizer:
    """Two groups, of different learning rates."""
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 2 * lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def batches(steps: int) -> list[Tensor]:
    return [torch.randn(16, 6) for _ in range(steps)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, snapshots: SnapshotEnsemble, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
        snapshots.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("steps", "cycles"), [(12, 3), (10, 4), (7, 1), (5, 5)])
def test_learning_rates_are_those_of_the_paper(steps, cycles):
    model = network()
    optimizer = sgd(model)
    snapshots = SnapshotEnsemble(model, optimizer, steps, cycles)
    length = ceil(steps / cycles)
    for t, x in enumerate(batches(steps), 1):
        factor = 0.5 * (cos(pi * ((t - 1) % length) / length) + 1)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.2 * factor], rel=1e-12)
        train(model, optimizer, snapshots, [x])
    assert len(snapshots.snapshots) == ceil(steps / length)


@pytest.mark.parametrize(("steps", "cycles", "ends"), [(12, 3, [4, 8, 12]), (11, 3, [4, 8, 11]), (3, 3, [1, 2, 3])])
def test_snapshots_are_the_models_at_the_ends_of_cycles(steps, cycles, ends):
    model = network()
    optimizer = sgd(model)
    snapshots, expected = SnapshotEnsemble(model, optimizer, steps, cycles), []
    for t, x in enumerate(batches(steps), 1):
        train(model, optimizer, snapshots, [x])
        if t in ends:
            expected.append(values(model))
        assert len(snapshots.snapshots) == len(expected)
    assert model.training
    x = torch.randn(5, 6)
    for last in (None, 1, 2):
        ensemble = snapshots.ensemble() if last is None else snapshots.ensemble(last=last)
        chosen = expected if last is None else expected[-last:]
        assert not ensemble.training
        members = ek.unstack(ensemble)
        assert all(same(member.state_dict(), state) for member, state in zip(members, chosen, strict=True))
        torch.testing.assert_close(ensemble(x), torch.stack([member(x) for member in members]))


@pytest.mark.parametrize("interrupted", [0, 1, 4, 6, 9, 12])
@pytest.mark.parametrize("ours_first", [False, True])
def test_a_resumed_run_has_the_same_bits(interrupted, ours_first):
    """In the midst of a cycle and at its end; states of model, optimizer and snapshots are loaded in either order."""
    data, model = batches(12), network()
    optimizer = sgd(model)
    snapshots = SnapshotEnsemble(model, optimizer, 12, 3)
    train(model, optimizer, snapshots, data[:interrupted])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), snapshots.state_dict()], file)
    train(model, optimizer, snapshots, data[interrupted:])

    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = network()
    again_optimizer = sgd(again)
    if ours_first:
        resumed = SnapshotEnsemble(again, again_optimizer, 12, 3)
        resumed.load_state_dict(states[2])
        again.load_state_dict(states[0])
        again_optimizer.load_state_dict(states[1])
    else:
        again.load_state_dict(states[0])
        again_optimizer.load_state_dict(states[1])
        resumed = SnapshotEnsemble(again, again_optimizer, 12, 3)
        resumed.load_state_dict(states[2])
    train(again, again_optimizer, resumed, data[interrupted:])
    assert same(model.state_dict(), again.state_dict())
    assert len(resumed.snapshots) == 3
    assert same(snapshots.ensemble().state_dict(), resumed.ensemble().state_dict())
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in again_optimizer.param_groups]


def test_learning_rates_that_are_tensors():
    """They stay the objects that a captured step reads."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    snapshots = SnapshotEnsemble(model, optimizer, 8, 2)
    train(model, optimizer, snapshots, batches(3))
    state, lr = snapshots.state_dict(), optimizer.param_groups[0]["lr"].item()
    train(model, optimizer, snapshots, batches(2))
    before = optimizer.param_groups[0]["lr"]
    snapshots.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is before
    assert before.item() == lr


def test_snapshots_are_copies():
    model = network()
    optimizer = sgd(model)
    snapshots = SnapshotEnsemble(model, optimizer, 4, 4)
    train(model, optimizer, snapshots, batches(1))
    before = values(snapshots.snapshots[0])
    assert all(p.grad is None for p in snapshots.snapshots[0].parameters())
    train(model, optimizer, snapshots, batches(1))
    assert same(values(snapshots.snapshots[0]), before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DP", "compile"])
def test_wrapped_models(wrap):
    model = network()
    optimizer = sgd(model)
    snapshots = SnapshotEnsemble(wrap(model), optimizer, 4, 2)
    train(model, optimizer, snapshots, batches(4))
    assert type(snapshots.snapshots[1]) is nn.Sequential
    assert same(values(snapshots.snapshots[1]), values(model))


def test_another_device():
    """Snapshots move; the model stays where it is."""
    model = network()
    snapshots = SnapshotEnsemble(model, sgd(model), 2, 2, device="meta")
    snapshots.optimizer.step()
    snapshots.step()
    assert all(t.is_meta for t in snapshots.snapshots[0].state_dict().values())
    assert not any(t.is_meta for t in model.state_dict().values())


# ---------------------------------------------------------------------------------------------------------- bad input


def made(steps: int = 4, cycles: int = 2, done: int = 0) -> SnapshotEnsemble:
    model = network()
    snapshots = SnapshotEnsemble(model, sgd(model), steps, cycles)
    train(model, snapshots.optimizer, snapshots, batches(done))
    return snapshots


BAD = {
    "model": (lambda: SnapshotEnsemble(3, None, 4, 2), TypeError, "SnapshotEnsemble: model should be"),
    "optimizer": (lambda: SnapshotEnsemble(network(), 0.1, 4, 2), TypeError, "SnapshotEnsemble: optimizer should be"),
    "steps": (lambda: made(0, 1), ValueError, "SnapshotEnsemble: num_steps should be"),
    "cycles": (lambda: made(4, 0), ValueError, "SnapshotEnsemble: num_cycles should be"),
    "cycles_float": (lambda: made(4, 2.0), TypeError, "SnapshotEnsemble: num_cycles should be"),
    "more_cycles": (
        lambda: made(4, 5),
        ValueError,
        "SnapshotEnsemble: num_cycles should be at most num_steps=4, got 5",
    ),
    "steps_done": (lambda: made(done=5), ValueError, "SnapshotEnsemble.step: step should be called num_steps=4 times"),
    "none_yet": (lambda: made(done=1).ensemble(), ValueError, "SnapshotEnsemble.ensemble: last should be"),
    "last": (lambda: made(done=2).ensemble(2), ValueError, "last should be at most 1, as there are, got 2"),
    "last_0": (lambda: made(done=2).ensemble(0), ValueError, "SnapshotEnsemble.ensemble: last should be"),
    "last_float": (lambda: made(done=2).ensemble(1.0), TypeError, "SnapshotEnsemble.ensemble: last should be"),
    "state": (
        lambda: made().load_state_dict(made(9, 3).state_dict()),
        ValueError,
        "SnapshotEnsemble.load_state_dict: state should be of cycles of 2 steps, got one of 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words) as raised:
        call()
    assert ", got " in str(raised.value)
