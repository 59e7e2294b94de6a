"""A classical ensemble of MLPs and a BatchEnsemble, each as it is usually written and on effens_kernels.

    python examples/batchensemble_mlp.py
    python examples/batchensemble_mlp.py --data cifar10 --root ~/data

The experiment of a well-known BatchEnsemble tutorial: two hidden layers of 128, five members, Adam with a rate of 1e-3,
20 epochs in batches of 128.  One loop trains all four models on the same batches; the tutorial's own figures stand
below.  BatchEnsemble: Wen et al. 2020.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from batchensemble_models import BatchEnsemble, BroadcastBatchEnsemble, LoopEnsemble, StackedEnsemble
from image_data import Images, load
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import effens_kernels as ek

# As printed by the tutorial, on CIFAR-10 and a CPU that it does not name: name, seconds in all, accuracy of a member.
TUTORIAL = (("members, one after the other", "about 3,500", 0.5196), ("BatchEnsemble", "457", 0.5126))


@dataclass
class Trainee:
    name: str
    model: nn.Module
    fused: bool
    seconds: list[float] = field(default_factory=list)  # of each epoch
    loss: float = float("nan")

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def seconds_per_epoch(self) -> float:
        return median(self.seconds[1:] or self.seconds)  # the first one warms up

    def step(self, x: Tensor, y: Tensor) -> None:
        """The mean of the members' losses, each member learning from every row."""
        self.optimizer.zero_grad()
        logits = self.model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item()


@dataclass(frozen=True)
class Quality:
    """On rows that no model has seen; all but the first of the members' mean probabilities."""

    member_accuracy: float  # mean over the members
    accuracy: float
    nll: float  # negative log-likelihood, nats
    ece: float  # expected calibration error, 15 bins


@torch.no_grad()
def evaluate(model: nn.Module, data: Images) -> Quality:
    parts = [model(x) for x in data.x_test.split(1024)]
    logits, y = torch.cat(parts, dim=1), data.y_test  # [E, N, classes]
    return Quality(
        member_accuracy=ek.metrics.member_accuracies(logits, y).mean().item(),
        accuracy=ek.metrics.accuracy(logits, y).item(),
        nll=ek.metrics.nll(logits, y).item(),
        ece=ek.metrics.ece(logits, y, n_bins=15).item(),
    )


def trainees_for(data: Images, args: argparse.Namespace) -> list[Trainee]:
    sizes = data.num_features, args.hidden, data.num_classes, args.members
    loop, stacked = LoopEnsemble(*sizes), StackedEnsemble(*sizes)
    stacked.load_state_dict(_stacked(loop, stacked))
    tutorial, ours = BroadcastBatchEnsemble(*sizes, args.std), BatchEnsemble(*sizes, args.std)
    # Every other module of the tutorial's is a ReLU.
    ours.load_state_dict({f"layers.{int(name[0]) // 2}{name[1:]}": t for name, t in tutorial.state_dict().items()})
    return [
        Trainee("members, Python loop", loop, False),
        Trainee("members, effens_kernels", stacked, True),
        Trainee("BatchEnsemble, tutorial's layer", tutorial, False),
        Trainee("BatchEnsemble, effens_kernels", ours, True),
    ]


def _stacked(loop: LoopEnsemble, stacked: StackedEnsemble) -> dict[str, Tensor]:
    """The loop's parameters under the names of the other, so that both start alike."""
    of_members = [dict(member.state_dict()) for member in loop.members]
    values = (torch.stack(same) for same in zip(*(state.values() for state in of_members)))
    return dict(zip(stacked.state_dict(), values, strict=True))


def train(trainees: list[Trainee], data: Images, args: argparse.Namespace) -> None:
    """Epoch by epoch, each model in turn, on the same batches."""
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=args.epochs * len(trainees), loss=float("nan"))
        for epoch in range(args.epochs):
            for trainee in trainees:
                progress.update(task, description=trainee.name)
                batches = data.batches(args.batch, torch.Generator().manual_seed(args.seed + epoch))
                begin = perf_counter()
                for x, y in batches:
                    trainee.step(x, y)
                trainee.seconds.append(perf_counter() - begin)
                progress.update(task, advance=1, loss=trainee.loss)


def show(trainees: list[Trainee], data: Images) -> None:
    table = new_table(
        f"On {len(data.y_test):,} images of {data.name} that no model has seen",
        "model",
        "parameters",
        "ms per\nepoch",
        "",
        "accuracy of\na member",
        "of the\nensemble",
        "NLL",
        "ECE",
        caption="ensemble: mean of the members' probabilities; NLL in nats; ECE over 15 bins; time: median epoch",
    )
    usual = 0.0
    for trainee in trainees:
        quality, seconds = evaluate(trainee.model, data), trainee.seconds_per_epoch
        usual = usual if trainee.fused else seconds
        table.add_row(
            trainee.name,
            f"{trainee.num_parameters:,}",
            f"{seconds * 1e3:,.1f}",
            f"[green]{usual / seconds:.1f} x[/]" if trainee.fused else "",
            f"{quality.member_accuracy:.2%}",
            f"{quality.accuracy:.2%}",
            f"{quality.nll:.3f}",
            f"{quality.ece:.3f}",
            style="bold" if trainee.fused else "",
            end_section=trainee.fused,
        )
    console.print(table)


def show_tutorial() -> None:
    table = new_table(
        "The tutorial's own figures: CIFAR-10, 20 epochs, on its machine",
        "model",
        "seconds in all",
        "accuracy of a member",
    )
    for name, seconds, accuracy in TUTORIAL:
        table.add_row(name, seconds, f"{accuracy:.2%}")
    console.print(table)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        data = load(args.data, args.root, args.seed)
    except RuntimeError as error:
        raise SystemExit(f"batchensemble_mlp: {error}") from None
    console.rule("[bold]BatchEnsemble and a classical ensemble of MLPs")
    console.print(
        f"{args.members} members, {data.num_features}-{args.hidden}-{args.hidden}-{data.num_classes}, "
        f"{len(data.y_train):,} images in batches of {args.batch}, {args.epochs} epochs\n"
        f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, threads: {args.threads}[/]"
    )
    trainees = trainees_for(data, args)
    train(trainees, data, args)
    show(trainees, data)
    show_tutorial()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="(%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="of CIFAR-10's files (%(default)s)")
    parser.add_argument("--members", type=int, default=5, help="of the ensembles (%(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="width of the two hidden layers (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="rows per step (%(default)s)")
    parser.add_argument("--std", type=float, default=0.01, help="of the members' scales at the start (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (%(default)s)")
    args = parser.parse_args()
    for name in ("members", "hidden", "epochs", "batch", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
