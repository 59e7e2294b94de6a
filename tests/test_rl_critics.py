"""examples/rl_critics.py: its target, its transitions and its comparison by hand, and a short run of it all."""

from __future__ import annotations

import importlib
import math
import sys
from argparse import Namespace
from itertools import combinations

import pytest
import torch
from common import ROOT, run_python

gymnasium = pytest.importorskip("gymnasium")
for package in ("rich", "matplotlib"):
    pytest.importorskip(package)

ARGS = Namespace(
    env="CartPole-v1",
    members=5,
    subset=2,
    hidden=8,
    steps=10,
    start=3,
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


@pytest.fixture
def learning(rl):
    return importlib.import_module("rl_learning")


def batch_of(rl, rows: int, features: int = 3, actions: int = 4):
    terminated = (torch.arange(rows) % 3 == 0).float()
    states = torch.randn(2, rows, features)
    return rl.Batch(states[0], torch.randint(actions, (rows,)), torch.randn(rows), states[1], terminated)


def values_of(critics, member: int, states):
    """[B, actions] of one member, in float64 and layer by layer."""
    x, layers = states.double(), list(critics.layers)
    for layer in layers:
        x = (layer.weight[member].double() @ x.T).T + layer.bias[member].double()
        x = x if layer is layers[-1] else x.clamp(min=0)
    return x


def test_target_is_that_of_two_members(rl):
    agent, batch = rl.Agent(3, 4, ARGS), batch_of(rl, 9)
    found = agent.targets(batch)
    torch.testing.assert_close(found[::3], 0.1 * batch.reward[::3])  # terminated
    values = [values_of(agent.copies, e, batch.next_state) for e in range(ARGS.members)]
    possible = []
    for pair in combinations(range(ARGS.members), 2):
        smaller = [[min(values[e][n, a].item() for e in pair) for a in range(4)] for n in range(9)]
        possible.append(
            [
                0.1 * r + 0.9 * (1 - t) * max(q)
                for r, t, q in zip(batch.reward.tolist(), batch.terminated.tolist(), smaller)
            ]
        )
    assert (
        sum(torch.allclose(found.double(), torch.tensor(target).double(), rtol=1e-5, atol=1e-6) for target in possible)
        == 1
    )
    drawn = torch.stack([agent.targets(batch) for _ in range(30)])
    assert len(drawn.unique(dim=0)) > 1


def test_copies_follow_slowly(rl):
    agent = rl.Agent(3, 4, ARGS)
    before = [p.clone() for p in agent.copies.parameters()]
    agent.update(batch_of(rl, 9))
    for old, slow, fast in zip(before, agent.copies.parameters(), agent.critics.parameters()):
        assert not fast.equal(old)
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_losses_of_members(learning):
    values, target = torch.randn(2, 3, 4), torch.randn(3)
    found = learning.member_losses(values, torch.tensor([3, 0, 1]), target)
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
        return torch.zeros(1), {}

    def step(self, action):
        self.count += 1
        return torch.full((1,), float(self.count)), 1.0, False, self.count == 4, {}


def test_what_a_time_limit_cuts_off_has_not_terminated(rl):
    agent, replay = rl.Agent(1, 2, ARGS), rl.Replay(ARGS.steps, 1, ARGS.device)
    seen = []
    history = rl.learn(Counting(), agent, replay, ARGS, lambda history: seen.append(len(history.value)))
    assert seen == list(range(1, ARGS.steps + 1))
    assert history.episodes == [(4, 4.0), (8, 4.0)]
    assert len(history.disagreement) == ARGS.steps
    assert replay.data.state.flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert replay.data.next_state.flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert not replay.data.terminated.any()


def test_states_are_of_one_order(learning):
    env = learning.Task("CartPole-v1", ARGS.device)
    assert (env.features, env.actions) == (4, 2)
    plain = gymnasium.make("CartPole-v1")
    for state, same in ((env.reset(seed=3)[0], plain.reset(seed=3)[0]), (env.step(1)[0], plain.step(1)[0])):
        limits = torch.tensor([2.4, 2, math.radians(12), 2])  # position and angle at which an episode ends, and speeds
        torch.testing.assert_close(state, torch.from_numpy(same) / limits)


def stacked(parameters, members: int):
    """[E, ...] each; those of a loop come member by member."""
    per_member = len(parameters) // members
    if len(parameters) == 6:
        return parameters
    return [torch.stack(parameters[n::per_member]) for n in range(per_member)]


def test_four_ways_agree(rl):
    agent = rl.Agent(3, 4, ARGS)
    learners = rl.learners_of(agent.critics, 1e-3)
    assert len(learners) == 4
    for n in range(3):
        batch = batch_of(rl, 32)
        target = agent.targets(batch)
        losses = {name: learner.update(batch, target) for name, learner in learners.items()}
        parameters = {name: learner.optimizer.param_groups[0]["params"] for name, learner in learners.items()}
        gradients = {name: stacked([p.grad for p in ps], ARGS.members) for name, ps in parameters.items()}
        parameters = {name: stacked([p.detach() for p in ps], ARGS.members) for name, ps in parameters.items()}
        for name in learners:
            torch.testing.assert_close(losses[name], losses[rl.LOOP], msg=f"{name}, losses of update {n}")
            for found, expected in zip(gradients[name], gradients[rl.LOOP], strict=True):
                torch.testing.assert_close(found, expected, msg=f"{name}, gradients of update {n}")
            for found, expected in zip(parameters[name], parameters[rl.LOOP], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"{name}, after update {n}")


def test_check_finds_a_wrong_update(rl):
    agent = rl.Agent(3, 4, ARGS)
    batches = [(batch, agent.targets(batch)) for batch in (batch_of(rl, 32) for _ in range(3))]
    rl.check_agreement(rl.learners_of(agent.critics, ARGS.rate), batches)
    for name in rl.learners_of(agent.critics, ARGS.rate):
        learners = rl.learners_of(agent.critics, ARGS.rate)
        learners[name].optimizer.param_groups[0]["lr"] *= 1.5  # wrong gradients show in the losses after them
        with pytest.raises(AssertionError, match="losses of update 1"):
            rl.check_agreement(learners, batches)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "rl_learning", raising=False)
    with pytest.raises(SystemExit, match=r"pip install gymnasium$"):
        importlib.import_module("rl_learning")


def test_program(tmp_path):
    plot = tmp_path / "plot.png"
    options = "--steps 80 --start 20 --batch 16 --members 4 --hidden 16 --episodes 1 --rounds 1 --threads 1"
    argv = ["rl_critics.py", *options.split(), "--output", str(plot)]
    run = run_python(
        f"import runpy, sys; sys.path.insert(0, 'examples'); sys.argv = {argv}; "
        "runpy.run_path('examples/rl_critics.py', run_name='__main__')"
    )
    assert run.returncode == 0, run.stderr
    for words in ("What to see", "Python loop", "torch.func.vmap", "torch.baddbmm", "effens_kernels", "wrote"):
        assert words in run.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
