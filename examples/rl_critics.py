"""Ten critics learn a control task by REDQ, and what an update of them costs, written in four ways.

    python examples/rl_critics.py
    python examples/rl_critics.py --env Acrobot-v1 --steps 6000

Randomized ensembled double Q-learning (REDQ, Chen et al. 2021) on a task of Gymnasium's with few actions.  The critics
learn from the transitions of the agent itself, in several updates per step of the environment.  All members have the
same target, in which the minimum over two members, drawn anew for each update, counters overestimation:

    y = r + gamma (1 - terminated) max_a min_{i in M} Q'_i(s', a)

Q' are slow copies of the critics.  In the paper actions are continuous, and an actor learns to maximize the mean of all
members.  Here a critic has the values of all actions, as in a DQN: the largest mean is the policy, epsilon-greedy while
it learns, and the target takes the largest minimum.  An episode cut off by its time limit has not terminated: what
would have followed still counts.  For a run of half a minute the copies follow faster than in the paper.

1. learns, and shows returns and the members' disagreement over the steps of the environment,
2. times forward, backward and Adam of an update, for the same critics and batches written in four ways.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import gymnasium
import torch
from batchensemble_models import LoopEnsemble
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import effens_kernels as ek

OURS, LOOP = "effens_kernels", "Python loop"
ROWS = 10  # of the table of learning
UPDATES = 20  # that each way of writing them has in its turn


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = gymnasium.make(args.env)
    agent = Agent(env.observation_space.shape[0], int(env.action_space.n), args)
    replay = Replay(args.steps, env.observation_space.shape[0], args.device)

    console.rule(f"[bold]REDQ: {args.members} critics learn {args.env}")
    console.print(
        f"{args.members} members, {'-'.join(str(layer.in_features) for layer in agent.critics.layers)}-"
        f"{env.action_space.n}; {args.ratio} updates per step of the environment, in batches of {args.batch}; "
        f"targets of {args.subset} members\n"
        f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, {args.device}, threads: {args.threads}[/]"
    )
    before = evaluate(agent, args)
    history = learn(env, agent, replay, args)
    show_learning(history, before, evaluate(agent, args), args)

    batches = [(batch, agent.targets(batch)) for batch in (replay.sample(args.batch) for _ in range(UPDATES))]
    learners = learners_of(agent.critics, args.rate)
    check_agreement(learners, batches[:5])
    seconds = time_updates(learners, batches, args)
    show_updates(seconds)
    plot(history, seconds, args)
    console.print(f"wrote {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=("CartPole-v1", "Acrobot-v1"), default="CartPole-v1", help="(%(default)s)")
    parser.add_argument("--members", type=int, default=10, help="critics (%(default)s)")
    parser.add_argument("--subset", type=int, default=2, help="members whose minimum is the target (%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="width of the two hidden layers (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of the environment (%(default)s)")
    parser.add_argument("--ratio", type=int, default=4, help="updates per step of the environment (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="transitions per update (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam (%(default)s)")
    parser.add_argument("--gamma", type=float, default=0.99, help="discount (%(default)s)")
    parser.add_argument("--tau", type=float, default=0.1, help="share of the critics in their copies (%(default)s)")
    parser.add_argument("--episodes", type=int, default=10, help="of an evaluation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of timing (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("rl_critics.png"), help="the plot (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the critics (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, actions and batches (%(default)s)")
    args = parser.parse_args()
    for name in ("members", "subset", "hidden", "steps", "ratio", "batch", "episodes", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(args, name)}")
    if args.subset > args.members:
        parser.error(f"--subset should be at most --members, {args.members}, got {args.subset}")
    return args


# ---------------------------------------------------------------------------------------------------- 1. learning


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
        return batch.reward + self.gamma * (1 - batch.terminated) * values.amin(0).amax(1)

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


def learn(env: gymnasium.Env, agent: Agent, replay: Replay, args: argparse.Namespace) -> History:
    columns = (
        TextColumn("learning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("return {task.fields[last]:.0f}"),
    )
    history, episode = History(), 0.0
    state = tensor(env.reset(seed=args.seed)[0], args.device)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=args.steps, last=float("nan"))
        for step in range(1, args.steps + 1):
            values = agent.values(state)
            action = int(values.mean(0).argmax())
            history.value.append(values[:, action].mean().item())
            history.disagreement.append(values[:, action].std(correction=0).item())
            if torch.rand(()) < epsilon(step / args.steps):
                action = int(torch.randint(values.shape[1], ()))
            next_state, reward, terminated, truncated, _ = env.step(action)
            next_state = tensor(next_state, args.device)
            replay.add(state, action, reward, next_state, terminated)
            state, episode = next_state, episode + reward
            if step >= args.batch:
                for _ in range(args.ratio):
                    agent.update(replay.sample(args.batch))
            if terminated or truncated:
                history.episodes.append((step, episode))
                progress.update(task, last=episode)
                state, episode = tensor(env.reset()[0], args.device), 0.0
            progress.update(task, advance=1)
    return history


def tensor(state: object, device: torch.device) -> Tensor:
    return torch.as_tensor(state, dtype=torch.float32, device=device)


def epsilon(progress: float) -> float:
    """The share of random actions, from all to one in twenty; after a quarter of the steps it stays there."""
    return max(0.05, 1 - 4 * progress)


def evaluate(agent: Agent, args: argparse.Namespace) -> float:
    """Mean return of the greedy policy, always from the same starts."""
    env, total = gymnasium.make(args.env), 0.0
    for episode in range(args.episodes):
        state, over = env.reset(seed=10_000 + episode)[0], False
        while not over:
            action = int(agent.values(tensor(state, args.device)).mean(0).argmax())
            state, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
    return total / args.episodes


def show_learning(history: History, before: float, after: float, args: argparse.Namespace) -> None:
    table = new_table(
        f"1. Learning {args.env}",
        "steps of the\nenvironment",
        "episodes",
        "their mean\nreturn",
        "value",
        "disagreement",
        caption="value of the best action: mean over the members; disagreement: standard deviation over them",
    )
    size = -(-args.steps // ROWS)
    for begin in range(0, args.steps, size):
        end = min(begin + size, args.steps)
        returns = [episode for step, episode in history.episodes if begin < step <= end]
        table.add_row(
            f"{end:,}",
            f"{len(returns)}",
            f"{mean(returns):.1f}" if returns else "–",
            f"{mean(history.value[begin:end]):.2f}",
            f"{mean(history.disagreement[begin:end]):.3f}",
        )
    console.print(table)
    console.print(
        f"Mean return of {args.episodes} episodes without random actions: {before:.1f} before learning, "
        f"[bold]{after:.1f}[/] after."
    )


# ------------------------------------------------------------------------------------------------ 2. the update


def learners_of(critics: ek.nn.EnsembleMLP, rate: float) -> dict[str, Learner]:
    """Copies of the same critics, written in four ways."""
    loop = loop_of(critics)
    of_vmap, _ = torch.func.stack_module_state(list(loop.members))

    def member(parameters: dict[str, Tensor], state: Tensor) -> Tensor:
        return torch.func.functional_call(loop.members[0], parameters, (state,))

    of_baddbmm = [p.detach().clone().requires_grad_() for p in critics.parameters()]

    def baddbmm(state: Tensor) -> Tensor:
        x = state.expand(critics.num_members, -1, -1)
        for n in range(0, len(of_baddbmm), 2):
            weight, bias = of_baddbmm[n : n + 2]
            x = torch.baddbmm(bias.unsqueeze(1), x.relu() if n else x, weight.mT)
        return x

    ours = copy.deepcopy(critics)
    return {
        LOOP: Learner(loop, list(loop.parameters()), rate),
        "torch.func.vmap": Learner(
            lambda state: torch.func.vmap(member, (0, None))(of_vmap, state), list(of_vmap.values()), rate
        ),
        "torch.baddbmm": Learner(baddbmm, of_baddbmm, rate),
        OURS: Learner(ours, list(ours.parameters()), rate),
    }


def loop_of(critics: ek.nn.EnsembleMLP) -> nn.Module:
    """The same critics, each a `nn.Sequential`."""
    first, last = critics.layers[0], critics.layers[-1]
    loop = LoopEnsemble(first.in_features, first.out_features, last.out_features, critics.num_members)
    for e, member in enumerate(loop.members):
        values = (p[e] for p in critics.state_dict().values())
        member.load_state_dict(dict(zip(member.state_dict(), values, strict=True)))
    return loop.to(first.weight.device)


def check_agreement(learners: dict[str, Learner], batches: list[tuple[Batch, Tensor]]) -> None:
    """Equal losses in several updates in a row, so that equal gradients are part of it."""
    for n, (batch, target) in enumerate(batches):
        losses = {name: learner.update(batch, target) for name, learner in learners.items()}
        for name, found in losses.items():
            where = f"{name}, losses of update {n}"
            torch.testing.assert_close(
                found, losses[LOOP], rtol=1e-4, atol=1e-5, msg=lambda text, where=where: f"{where}: {text}"
            )


def time_updates(
    learners: dict[str, Learner], batches: list[tuple[Batch, Tensor]], args: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of an update; the ways take turns, so that all see the same disturbances of the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for _ in range(args.rounds + 1):
        for name, learner in learners.items():
            synchronize(args.device)
            begin = perf_counter()
            for batch, target in batches:
                learner.update(batch, target)
            synchronize(args.device)
            seconds[name].append((perf_counter() - begin) / len(batches))
    return {name: median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show_updates(seconds: dict[str, float]) -> None:
    table = new_table(
        "2. The update of all critics: forward, backward and Adam, targets given",
        "written as",
        "updates\nper second",
        "against\nthe loop",
        "effens_kernels\nis faster by",
        caption="equal losses, checked before; median of rounds in which all take turns",
    )
    for name, value in seconds.items():
        table.add_row(
            name,
            f"{1 / value:,.0f}",
            f"{seconds[LOOP] / value:.2f} x",
            "" if name == OURS else f"[green]{value / seconds[OURS]:.2f} x[/]",
            style="bold" if name == OURS else "",
        )
    console.print(table)


def plot(history: History, seconds: dict[str, float], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (returns, disagreement, updates) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    if history.episodes:
        returns.plot(*zip(*history.episodes), marker=".", linewidth=0.8)
    returns.set(xlabel="steps of the environment", ylabel="return of the episode", title=args.env)
    disagreement.plot(range(1, args.steps + 1), history.disagreement, linewidth=0.5)
    disagreement.set(xlabel="steps of the environment", ylabel="standard deviation over members", title="disagreement")
    updates.barh(list(seconds), [1 / value for value in seconds.values()])
    updates.set(xlabel="updates per second", title="the same update")
    for axis in (returns, disagreement, updates):
        axis.grid(alpha=0.3)
    figure.savefig(args.output, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
