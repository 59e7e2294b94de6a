"""MixtureEnsembles: how good four networks are that share the parameters of one half, one, or several.

    python examples/mixture_ensembles.py
    python examples/mixture_ensembles.py --data cifar100 --root ~/data --depth 28 --width 10 --base 16 --epochs 200

A wide residual network becomes an ensemble whose members mix shared templates (Teterwak et al. 2021), once for each
budget of parameters, and is trained by the paper's recipe: SGD with Nesterov momentum 0.9, a rate of 0.1 that falls to
a fifth after 30, 60 and 90 % of the epochs, weight decay 5e-4 but for coefficients.  Beside it are one network, and as
many independent ones.  The plot has accuracy, NLL, ECE and diversity over parameters (the paper's figure 3), and what
becomes of accuracy between two members (figure 4).
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from image_data import Images, load
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from wide_resnet import WideResNet

import effens_kernels as ek

SINGLE, INDEPENDENT = "one network", "independent networks"
DROPS, FACTOR = (0.3, 0.6, 0.9), 0.2  # of the learning rate
POINTS = 11  # of the way from one member to another


class Independent(nn.Module):
    """Networks one after the other: [B, ...] to [E, B, ...]."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks])

    def member(self, e: int) -> nn.Module:
        return copy.deepcopy(self.networks[e])


@dataclass
class Trainee:
    name: str
    model: nn.Module
    groups: list[dict[str, object]]  # for the optimizer
    budget: bool = False
    seconds: list[float] = field(default_factory=list)  # of each epoch
    loss: float = float("nan")

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


@dataclass(frozen=True)
class Quality:
    """On images that no model has seen."""

    member_accuracy: float  # mean over the members
    accuracy: float  # of the mean of the members' probabilities, as are the next two
    nll: float  # nats
    ece: float
    diversity: float


@torch.no_grad()
def logits_of(model: nn.Module, data: Images) -> Tensor:
    """[E, N, classes]"""
    model.eval()
    return torch.cat([model(images(x, data)) for x in data.x_test.split(512)], dim=-2)


def evaluate(trainee: Trainee, data: Images) -> Quality:
    logits, y = logits_of(trainee.model, data), data.y_test
    return Quality(
        ek.metrics.member_accuracies(logits, y).mean().item(),
        ek.metrics.accuracy(logits, y).item(),
        ek.metrics.nll(logits, y).item(),
        ek.metrics.ece(logits, y).item(),
        ek.metrics.diversity(logits, y).item() if len(logits) > 1 else float("nan"),
    )


def images(x: Tensor, data: Images) -> Tensor:
    return x.unflatten(1, data.shape)


def augmented(x: Tensor, data: Images, generator: torch.Generator) -> Tensor:
    """Shifted by up to an eighth of the size, and, but for digits, mirrored half the time."""
    pad = data.shape[-1] // 8
    y = F.pad(images(x, data), [pad] * 4, value=-1.0)
    top, left = torch.randint(2 * pad + 1, (2,), generator=generator).tolist()
    y = y[..., top : top + data.shape[1], left : left + data.shape[2]]
    if data.name != "digits":
        flip = torch.rand(len(y), generator=generator) < 0.5
        y = torch.where(flip[:, None, None, None], y.flip(-1), y)
    return y.contiguous()


def trainees_for(data: Images, args: argparse.Namespace) -> list[Trainee]:
    def network() -> nn.Module:
        return WideResNet(args.depth, args.width, data.num_classes, data.shape[0], args.base)

    def plain(name: str, count: int) -> Trainee:
        model = Independent([network() for _ in range(count)])
        return Trainee(name, model, [{"params": list(model.parameters()), "weight_decay": args.weight_decay}])

    found = [plain(SINGLE, 1)]
    for budget in args.budgets:
        model = ek.convert(network(), "mixture", num_members=args.members, budget=f"{budget}x")
        name = f"mixture of {args.members}, budget {budget:g} x"
        found.append(Trainee(name, model, model.optimizer_groups(args.weight_decay), budget=True))
    return [*found, plain(f"{args.members} {INDEPENDENT}", args.members)]


def train(trainees: list[Trainee], data: Images, args: argparse.Namespace) -> None:
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=args.epochs * len(trainees), loss=float("nan"))
        for trainee in trainees:
            optimizer = torch.optim.SGD(trainee.groups, lr=args.rate, momentum=0.9, nesterov=True)
            milestones = [round(args.epochs * drop) for drop in DROPS]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, FACTOR)
            for epoch in range(args.epochs):
                progress.update(task, description=trainee.name)
                begin = perf_counter()
                run_epoch(trainee, optimizer, data, torch.Generator().manual_seed(args.seed + epoch), args.batch)
                schedule.step()
                trainee.seconds.append(perf_counter() - begin)
                progress.update(task, advance=1, loss=trainee.loss)


def run_epoch(
    trainee: Trainee, optimizer: torch.optim.Optimizer, data: Images, generator: torch.Generator, batch: int
) -> None:
    """The same images for every member, and the mean of the members' losses."""
    trainee.model.train()
    for x, y in data.batches(batch, generator):
        if len(y) < 2:  # of which BatchNorm has no variance
            continue
        optimizer.zero_grad()
        logits = trainee.model(augmented(x, data, generator))
        # Each member has a loss of its own: their sum, so that a member learns as fast as it would alone.
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits))) * len(logits)
        loss.backward()
        optimizer.step()
        trainee.loss = loss.item() / len(logits)


@torch.no_grad()
def between_members(trainee: Trainee, data: Images) -> list[float]:
    """Accuracy on the straight line from member 0 to member 1.

    BatchNorm takes the statistics of what it sees, since accumulated ones mean nothing on the way.
    """
    first, second = (trainee.model.member(e) for e in (0, 1))
    model = copy.deepcopy(first).train()
    found = []
    for step in torch.linspace(0, 1, POINTS).tolist():
        for p, a, b in zip(model.parameters(), first.parameters(), second.parameters()):
            p.copy_(a.lerp(b, step))
        correct = sum(
            (model(images(x, data)).argmax(-1) == y).sum().item()
            for x, y in zip(data.x_test.split(256), data.y_test.split(256))
        )
        found.append(correct / len(data.y_test))
    return found


def show(trainees: list[Trainee], qualities: list[Quality], data: Images) -> None:
    table = new_table(
        f"On {len(data.y_test):,} images of {data.name} that no model has seen",
        "model",
        "parameters",
        "s per\nepoch",
        "accuracy of\na member",
        "of the\nensemble",
        "NLL",
        "ECE",
        "diversity",
        caption="ensemble: mean of the members' probabilities; NLL in nats; ECE over 15 bins;\n"
        "diversity: how often two members differ, over the error of one; time: median epoch",
    )
    for trainee, quality in zip(trainees, qualities):
        table.add_row(
            trainee.name,
            f"{trainee.num_parameters:,}",
            f"{median(trainee.seconds):.2f}",
            f"{quality.member_accuracy:.2%}",
            f"{quality.accuracy:.2%}",
            f"{quality.nll:.3f}",
            f"{quality.ece:.3f}",
            "" if quality.diversity != quality.diversity else f"{quality.diversity:.2f}",
            style="bold" if trainee.budget else "",
        )
    console.print(table)


def plot(trainees: list[Trainee], qualities: list[Quality], curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    measures = (("accuracy", "accuracy"), ("nll", "NLL, nats"), ("ece", "ECE"), ("diversity", "diversity"))
    for axis, (measure, label) in zip(axes, measures):
        budgets = [(t.num_parameters / 1e6, getattr(q, measure)) for t, q in zip(trainees, qualities) if t.budget]
        axis.plot(*zip(*sorted(budgets)), marker="o", label="mixture ensemble")
        for trainee, quality in zip(trainees, qualities):
            if not trainee.budget:
                marker = "s" if trainee.name == SINGLE else "^"
                axis.plot(trainee.num_parameters / 1e6, getattr(quality, measure), marker, label=trainee.name)
        axis.set(xlabel="million parameters", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    steps = torch.linspace(0, 1, POINTS).tolist()
    for name, curve in curves.items():
        axes[-1].plot(steps, curve, marker=".", label=name)
    axes[-1].set(xlabel="from member 0 to member 1", ylabel="accuracy")
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=7, loc="upper center")
    axes[-1].set_ylim(top=1.45)  # room for the legend
    axes[-1].set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        data = load(args.data, args.root, args.seed)
    except RuntimeError as error:
        raise SystemExit(f"mixture_ensembles: {error}") from None
    console.rule("[bold]MixtureEnsembles: accuracy and uncertainty over a budget of parameters")
    console.print(
        f"WRN-{args.depth}-{args.width} of base {args.base}, {args.members} members, {len(data.y_train):,} images in "
        f"batches of {args.batch}, {args.epochs} epochs\n"
        f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, threads: {args.threads}[/]"
    )
    try:
        trainees = trainees_for(data, args)
    except ValueError as error:  # a depth or a budget that cannot be
        raise SystemExit(f"mixture_ensembles: {error}") from None
    if args.budgets:
        console.print(trainees[1].model.summary())
    train(trainees, data, args)
    qualities = [evaluate(trainee, data) for trainee in trainees]
    show(trainees, qualities, data)
    curves = {t.name: between_members(t, data) for t in trainees if t.name != SINGLE} if args.members > 1 else {}
    plot(trainees, qualities, curves, args.output)
    console.print(f"wrote {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10", "cifar100"), default="digits", help="(%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="of CIFAR's files (%(default)s)")
    parser.add_argument("--members", type=int, default=4, help="of the ensembles (%(default)s)")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.3], help="parameters, in networks"
    )
    parser.add_argument("--depth", type=int, default=22, help="of the network, 6 n + 4 (%(default)s)")
    parser.add_argument("--width", type=int, default=1, help="times the base (%(default)s)")
    parser.add_argument("--base", type=int, default=8, help="channels of the first layer (%(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="of learning, at the start (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="but for coefficients (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("mixture_ensembles.png"), help="the plot (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (%(default)s)")
    args = parser.parse_args()
    for name in ("members", "width", "base", "epochs", "batch", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
