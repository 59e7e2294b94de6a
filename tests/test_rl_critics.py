"""examples/rl_critics.py: its target, its transitions and its comparison by hand, and a short run of it all."""

from __future__ import annotations

import importlib
from argparse import Namespace
from itertools import combinations

import pytest
import torch
from common import ROOT, run_python

gymnasium = pytest.importorskip("gymnasium")
for package in ("rich", "matplotlib"):
    pytest.importorskip(package)

ARGS = Namespace(
    members=5,
    subset=2,
    hidden=8,
    steps=10,
    ratio=1,
    batch=4,
    rate=1e-2,
    gamma=0.9,
    tau=0.25,
    device=torch.device("cpu"),
    seed=0,
)


@pytest.fixture
def rl(monkeypatch):
    """The example as a module; as a program it finds what it imports beside itself."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("rl_critics")


def batch_of(rl, rows: int, features: int = 3, actions: int = 4):
    terminated = (torch.arange(rows) % 3 == 0).float()
    states = torch.randn(2, rows, features)
    return rl.Batch(states[0], torch.randint(actions, (rows,)), torch.randn(rows), states[1], terminated)


def test_target_is_that_of_two_members(rl):
    agent, batch = rl.Agent(3, 4, ARGS), batch_of(rl, 9)
    found = agent.targets(batch)
    torch.testing.assert_close(found[::3], batch.reward[::3])  # terminated
    values = [agent.copies(batch.next_state, member=e) for e in range(ARGS.members)]
    possible = [
        batch.reward + 0.9 * (1 - batch.terminated) * torch.minimum(values[a], values[b]).max(1).values
        for a, b in combinations(range(ARGS.members), 2)
    ]
    assert sum(torch.allclose(found, target) for target in possible) == 1
    drawn = torch.stack([agent.targets(batch) for _ in range(30)])
    assert len(drawn.unique(dim=0)) > 1


def test_copies_follow_slowly(rl):
    agent = rl.Agent(3, 4, ARGS)
    before = [p.clone() for p in agent.copies.parameters()]
    agent.update(batch_of(rl, 9))
    for old, slow, fast in zip(before, agent.copies.parameters(), agent.critics.parameters()):
        assert not fast.equal(old)
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_losses_of_members(rl):
    values, target = torch.randn(2, 3, 4), torch.randn(3)
    found = rl.member_losses(values, torch.tensor([3, 0, 1]), target)
    expected = [sum((v[n, a] - target[n]) ** 2 for n, a in enumerate((3, 0, 1))) / 3 for v in values]
    torch.testing.assert_close(found, torch.stack(expected))


def test_replay_keeps_the_last(rl):
    replay = rl.Replay(3, 2, ARGS.device)
    for n in range(5):
        replay.add(torch.full((2,), float(n)), n, n + 0.5, torch.full((2,), n + 1.0), n == 3)
    batch = replay.sample(200)
    assert set(batch.action.tolist()) == {2, 3, 4}
    n = batch.action.float()
    for found, expected in (
        (batch.state, n[:, None].expand(-1, 2)),
        (batch.reward, n + 0.5),
        (batch.next_state, n[:, None].expand(-1, 2) + 1),
        (batch.terminated, (n == 3).float()),
    ):
        assert found.equal(expected)


class Counting(gymnasium.Env):
    """The state counts the steps of an episode, which the time limit cuts off after four."""

    def reset(self, seed=None, options=None):
        self.count = 0
        return [0.0], {}

    def step(self, action):
        self.count += 1
        return [float(self.count)], 1.0, False, self.count == 4, {}


def test_what_a_time_limit_cuts_off_has_not_terminated(rl):
    agent, replay = rl.Agent(1, 2, ARGS), rl.Replay(ARGS.steps, 1, ARGS.device)
    history = rl.learn(Counting(), agent, replay, ARGS)
    assert history.episodes == [(4, 4.0), (8, 4.0)]
    assert len(history.disagreement) == ARGS.steps
    assert replay.data.state.flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert replay.data.next_state.flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert not replay.data.terminated.any()


def test_four_ways_agree_and_are_compared(rl):
    agent = rl.Agent(3, 4, ARGS)
    batches = [(batch, agent.targets(batch)) for batch in (batch_of(rl, 32) for _ in range(3))]
    rl.check_agreement(rl.learners_of(agent.critics, ARGS.rate), batches)
    for name in rl.learners_of(agent.critics, ARGS.rate):
        learners = rl.learners_of(agent.critics, ARGS.rate)
        learners[name].optimizer.param_groups[0]["lr"] *= 1.5  # wrong gradients show in the losses after them
        with pytest.raises(AssertionError, match="losses of update 1"):
            rl.check_agreement(learners, batches)


def test_program(tmp_path):
    plot = tmp_path / "plot.png"
    options = "--steps 80 --batch 16 --members 4 --hidden 16 --episodes 1 --rounds 1 --threads 1"
    argv = ["rl_critics.py", *options.split(), "--output", str(plot)]
    run = run_python(
        f"import runpy, sys; sys.path.insert(0, 'examples'); sys.argv = {argv}; "
        "runpy.run_path('examples/rl_critics.py', run_name='__main__')"
    )
    assert run.returncode == 0, run.stderr
    for words in ("before learning", "Python loop", "torch.func.vmap", "torch.baddbmm", "effens_kernels", "wrote"):
        assert words in run.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
