"""What rl_critics.py learns with: the task, its transitions, the critics and their targets, and the loop over steps."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import effens_kernels as ek

try:
    import gymnasium
except ModuleNotFoundError:
    raise SystemExit("rl_critics: gymnasium is missing; python -m pip install gymnasium") from None


class Task(gymnasium.ObservationWrapper):
    """States are tensors, divided by half their bounds, or by 2 where there are none, so that all are of one order."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(gymnasium.make(name))
        high = torch.as_tensor(self.env.observation_space.high)
        self.scale, self.device = torch.where(high.isinf(), 2.0, high / 2), device
        self.features, self.actions = len(high), int(self.env.action_space.n)

    def observation(self, state: object) -> Tensor:
        return (torch.as_tensor(state, dtype=torch.float32) / self.scale).to(self.device)


@dataclass(frozen=True)
class Batch:
    """Transitions, the states being [B, features] and all else [B]."""

    state: Tensor
    action: Tensor  # integers
    reward: Tensor
    next_state: Tensor
    terminated: Tensor  # 0 or 1


class Replay:
    """The last `capacity` transitions."""

    def __init__(self, capacity: int, features: int, device: torch.device) -> None:
        self.data = Batch(
            torch.zeros(capacity, features, device=device),
            torch.zeros(capacity, dtype=torch.int64, device=device),
            torch.zeros(capacity, device=device),
            torch.zeros(capacity, features, device=device),
            torch.zeros(capacity, device=device),
        )
        self.capacity, self.count = capacity, 0

    def add(self, state: Tensor, action: int, reward: float, next_state: Tensor, terminated: bool) -> None:
        at = self.count % self.capacity
        for stored, value in zip(vars(self.data).values(), (state, action, reward, next_state, terminated)):
            stored[at] = value
        self.count += 1

    def sample(self, size: int) -> Batch:
        rows = torch.randint(min(self.count, self.capacity), (size,), device=self.data.action.device)
        return Batch(*(stored[rows] for stored in vars(self.data).values()))


def member_losses(values: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each member, [E]; `values` [E, B, actions], `action` and `target` [B]."""
    chosen = values.gather(2, action.view(1, -1, 1).expand(len(values), -1, 1)).squeeze(2)
    return (chosen - target).square().mean(1)


class Learner:
    """Critics, as a function from states [B, features] to values [E, B, actions], and their update."""

    def __init__(self, values: Callable[[Tensor], Tensor], parameters: list[Tensor], rate: float) -> None:
        self.values = values
        self.optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)

    def update(self, batch: Batch, target: Tensor) -> Tensor:
        """The losses before it, [E].  Their sum is minimized, so that a member learns as fast as it would alone."""
        losses = member_losses(self.values(batch.state), batch.action, target)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()


class Agent:
    """Critics, their slow copies, and the policy that follows from them."""

    def __init__(self, features: int, actions: int, args: argparse.Namespace) -> None:
        widths = features, [args.hidden, args.hidden], actions
        self.critics = ek.nn.EnsembleMLP(*widths, num_members=args.members, activation="relu", device=args.device)
        self.copies = copy.deepcopy(self.critics).requires_grad_(False)
        self.learner = Learner(self.critics, list(self.critics.parameters()), args.rate)
        self.subset, self.gamma, self.tau = args.subset, args.gamma, args.tau

    @torch.no_grad()
    def values(self, state: Tensor) -> Tensor:
        """[E, actions] of one state."""
        return self.critics(state.unsqueeze(0)).squeeze(1)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        members = torch.randperm(self.critics.num_members, device=batch.state.device)[: self.subset]
        weights = [layer.weight[members] for layer in self.copies.layers]
        biases = [layer.bias[members] for layer in self.copies.layers]
        values = ek.ensemble_mlp(batch.next_state, weights, biases)  # [M, B, actions], of these members alone
        to_come = (1 - batch.terminated) * values.amin(0).amax(1)
        return (1 - self.gamma) * batch.reward + self.gamma * to_come

    def update(self, batch: Batch) -> None:
        self.learner.update(batch, self.targets(batch))
        with torch.no_grad():
            for slow, fast in zip(self.copies.parameters(), self.critics.parameters()):
                slow.lerp_(fast, self.tau)


@dataclass
class History:
    """Of each step the value of the best action, as the members' mean, and the standard deviation over members."""

    value: list[float] = field(default_factory=list)
    disagreement: list[float] = field(default_factory=list)
    episodes: list[tuple[int, float]] = field(default_factory=list)  # at which step it ended, and its return


def learn(
    env: Task, agent: Agent, replay: Replay, args: argparse.Namespace, each_step: Callable[[History], None]
) -> History:
    history, total = History(), 0.0
    state, _ = env.reset(seed=args.seed)
    for step in range(1, args.steps + 1):
        values = agent.values(state)
        action = int(values.mean(0).argmax())
        history.value.append(values[:, action].mean().item())
        history.disagreement.append(values[:, action].std(correction=0).item())
        if torch.rand(()) < epsilon(step / args.steps):
            action = int(torch.randint(values.shape[1], ()))
        next_state, reward, terminated, truncated, _ = env.step(action)
        replay.add(state, action, reward, next_state, terminated)
        state, total = next_state, total + reward
        if step > args.start:
            agent.learner.optimizer.param_groups[0]["lr"] = args.rate * (1 - step / args.steps)
            for _ in range(args.ratio):
                agent.update(replay.sample(args.batch))
        if terminated or truncated:
            history.episodes.append((step, total))
            (state, _), total = env.reset(), 0.0
        each_step(history)
    return history


def epsilon(progress: float) -> float:
    """The share of random actions, from all to one in twenty; after a quarter of the steps it stays there."""
    return max(0.05, 1 - 4 * progress)


def evaluate(agent: Agent, args: argparse.Namespace) -> float:
    """Mean return of the policy without random actions, always from the same starts."""
    env, total = Task(args.env, args.device), 0.0
    for episode in range(args.episodes):
        (state, _), over = env.reset(seed=10_000 + episode), False
        while not over:
            state, reward, terminated, truncated, _ = env.step(int(agent.values(state).mean(0).argmax()))
            total, over = total + reward, terminated or truncated
    return total / args.episodes
