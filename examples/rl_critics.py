"""Ten critics learn a control task by REDQ, and what an update of them costs, written in four ways.

    python examples/rl_critics.py
    python examples/rl_critics.py --env Acrobot-v1 --steps 6000

Randomized ensembled double Q-learning (REDQ, Chen et al. 2021) on a task of Gymnasium's with few actions.  The critics
learn from the transitions of the agent itself, in several updates per step of the environment.  All members have the
same target, in which the minimum over two members, drawn anew for each update, counters overestimation:

    y = (1 - gamma) r + gamma (1 - terminated) max_a min_{i in M} Q'_i(s', a)

Q' are slow copies of the critics.  In the paper actions are continuous, and an actor learns to maximize the mean of all
members.  Here a critic has the values of all actions, as in a DQN: the largest mean is the policy, epsilon-greedy while
it learns, and the target takes the largest minimum.  The factor 1 - gamma, which the paper has not, makes values mean
rewards, of the order of one.  An episode cut off by its time limit has not terminated: what would have followed still
counts.  For a run of half a minute the copies follow faster than in the paper, and the rate of learning falls to zero.

1. learns, and shows returns and the members' disagreement over the steps of the environment,
2. times forward, backward and Adam of an update, for the same critics and batches written in four ways.

The learning is in rl_learning.py.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
from batchensemble_models import LoopEnsemble
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rl_learning import Agent, Batch, History, Learner, Replay, Task, evaluate, learn
from torch import Tensor, nn

import effens_kernels as ek

REWARDS = {
    "CartPole-v1": "1 for each step that the pole stands, 500 at most",
    "Acrobot-v1": "-1 for each step until the arm is up, -500 at worst",
}
OURS, LOOP = "effens_kernels", "Python loop"
ROWS = 10  # of the table of learning
UPDATES = 20  # that each way of writing them has in its turn


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = Task(args.env, args.device)
    agent, replay = Agent(env.features, env.actions, args), Replay(args.steps, env.features, args.device)

    console.rule(f"[bold]REDQ: {args.members} critics learn {args.env}")
    console.print(
        f"reward: {REWARDS[args.env]}\n"
        f"{args.members} members, {env.features}-{args.hidden}-{args.hidden}-{env.actions}; targets of {args.subset}; "
        f"{args.ratio} updates per step of the environment, in batches of {args.batch}\n"
        f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, {args.device}, threads: {args.threads}[/]"
    )
    before = evaluate(agent, args)
    history = learn_in_sight(env, agent, replay, args)
    after = evaluate(agent, args)
    show_learning(history, args)

    batches = [(batch, agent.targets(batch)) for batch in (replay.sample(args.batch) for _ in range(UPDATES))]
    learners = learners_of(agent.critics, args.rate)
    check_agreement(learners, batches[:5])
    seconds = time_updates(learners, batches, args)
    show_updates(seconds)
    show_both(before, after, seconds, args)
    plot(history, seconds, args)
    console.print(f"wrote {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=REWARDS, default="CartPole-v1", help="(%(default)s)")
    parser.add_argument("--members", type=int, default=10, help="critics (%(default)s)")
    parser.add_argument("--subset", type=int, default=2, help="members whose minimum is the target (%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="width of the two hidden layers (%(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="of the environment (%(default)s)")
    parser.add_argument("--start", type=int, default=250, help="of them before the first update (%(default)s)")
    parser.add_argument("--ratio", type=int, default=2, help="updates per step of the environment (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="transitions per update (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam, at the start (%(default)s)")
    parser.add_argument("--gamma", type=float, default=0.99, help="discount (%(default)s)")
    parser.add_argument("--tau", type=float, default=0.05, help="share of the critics in their copies (%(default)s)")
    parser.add_argument("--episodes", type=int, default=10, help="of an evaluation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of timing (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("rl_critics.png"), help="the plot (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the critics (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, actions and batches (%(default)s)")
    args = parser.parse_args()
    for name in ("members", "subset", "hidden", "steps", "start", "ratio", "batch", "episodes", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(args, name)}")
    if args.subset > args.members:
        parser.error(f"--subset should be at most --members, {args.members}, got {args.subset}")
    if args.start >= args.steps:
        parser.error(f"--start should be less than --steps, {args.steps}, got {args.start}")
    return args


# ---------------------------------------------------------------------------------------------------- 1. learning


def learn_in_sight(env: Task, agent: Agent, replay: Replay, args: argparse.Namespace) -> History:
    columns = (
        TextColumn("learning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("return {task.fields[last]:.0f}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=args.steps, last=float("nan"))

        def each_step(history: History) -> None:
            progress.update(task, advance=1, **({"last": history.episodes[-1][1]} if history.episodes else {}))

        return learn(env, agent, replay, args, each_step)


def show_learning(history: History, args: argparse.Namespace) -> None:
    table = new_table(
        f"1. Learning {args.env}",
        "steps of the\nenvironment",
        "episodes\nended",
        "their mean\nreturn",
        "value",
        "disagreement",
        caption="value: of the best action, the rewards to come as a mean;\n"
        "disagreement: standard deviation of it over members",
    )
    size = -(-args.steps // ROWS)
    for begin in range(0, args.steps, size):
        end = min(begin + size, args.steps)
        returns = [episode for step, episode in history.episodes if begin < step <= end]
        table.add_row(
            f"{end:,}",
            f"{len(returns)}",
            f"{mean(returns):.1f}" if returns else "–",
            f"{mean(history.value[begin:end]):.3f}",
            f"{mean(history.disagreement[begin:end]):.4f}",
        )
    console.print(table)


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
                found, losses[LOOP], rtol=1e-3, atol=1e-7, msg=lambda text, where=where: f"{where}: {text}"
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


def show_both(before: float, after: float, seconds: dict[str, float], args: argparse.Namespace) -> None:
    updates = args.ratio * (args.steps - args.start)
    console.print(
        f"\nWhat to see: {args.episodes} episodes without random actions have a mean return of {before:.1f} before "
        f"learning and of [bold]{after:.1f}[/] after {args.steps:,} steps. The {updates:,} updates behind it cost "
        f"{updates * seconds[LOOP]:.1f} s as a Python loop over {args.members} critics, "
        f"[bold]{updates * seconds[OURS]:.1f} s[/] on effens_kernels.",
        width=min(console.width, 100),
    )


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
