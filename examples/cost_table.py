"""What efficient ensembles cost and what they are worth: the table that everybody quotes, measured.

    python examples/cost_table.py
    python examples/cost_table.py --data cifar10 --root ~/data --methods "single network" BatchEnsemble

One network, and every kind of ensemble of it, on the same images (scikit-learn's digits): time of training and of
inference, memory, and parameters as multiples of the single network's; accuracy, negative log-likelihood and
calibration on images that no model has seen, and on these turned, moved and noisy.  Beside the costs stands what is
commonly claimed.  Each cell is the median over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from cost_methods import METHODS, Claim
from cost_training import Settings, Trained
from image_data import Images, load, shifted
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import effens_kernels as ek

SINGLE = "single network"
SECONDS = 0.3  # of timing for each inference


@dataclass(frozen=True)
class Row:
    """Of one method and seed, or the median over seeds."""

    training: float  # seconds
    inference: float  # seconds, of all test images at once
    peak: float  # bytes alive at once in training
    kept: float  # bytes that predictions need
    accuracy: float
    nll: float
    ece: float
    shifted_accuracy: float
    shifted_nll: float
    shifted_ece: float


def quality(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[float, float, float]:
    logits = predict(x)
    return tuple(measure(logits, y).item() for measure in (ek.metrics.accuracy, ek.metrics.nll, ek.metrics.ece))


def seconds_of(call: Callable[[], object]) -> float:
    """Median of as many calls as the time allows, five at least."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < SECONDS:
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return median(times)


@torch.inference_mode()
def measured(trained: Trained, data: Images, x_shifted: Tensor) -> Row:
    inference = seconds_of(lambda: ek.ensemble_predict(trained.predict(data.x_test)))
    on_test = quality(trained.predict, data.x_test, data.y_test)
    on_shifted = quality(trained.predict, x_shifted, data.y_test)
    return Row(trained.seconds, inference, trained.peak, trained.kept, *on_test, *on_shifted)


def median_of(rows: list[Row]) -> Row:
    return Row(*(median(getattr(row, f.name) for row in rows) for f in fields(Row)))


COSTS = {"training": "training", "inference": "inference", "peak": "memory\nin training", "kept": "memory\nkept"}
QUALITIES = ("accuracy", "NLL", "ECE", "shifted\naccuracy", "shifted\nNLL", "shifted\nECE")


def costs(row: Row, single: Row, claim: Claim) -> list[str]:
    """As multiples of the single network's, each with what is claimed of it."""
    cells = []
    for name in COSTS:
        cells += [
            f"{getattr(row, name) / getattr(single, name):.2f}",
            *([] if name == "peak" else [getattr(claim, name)]),
        ]
    return cells


def qualities(row: Row) -> list[str]:
    numbers = [(row.accuracy, row.nll, row.ece), (row.shifted_accuracy, row.shifted_nll, row.shifted_ece)]
    return [cell for accuracy, nll, ece in numbers for cell in (f"{accuracy:.1%}", f"{nll:.3f}", f"{ece:.3f}")]


def show(rows: dict[str, Row]) -> None:
    columns = [part for name, title in COSTS.items() for part in ((title,) if name == "peak" else (title, "claimed"))]
    table = new_table(
        "What ensembles cost",
        "multiples of the single network's",
        *columns,
        caption="claimed: as commonly quoted, M and T being networks that are run; memory: most bytes that are alive\n"
        "at once in a step of training, and those that are kept for predictions",
    )
    for name, row in rows.items():
        table.add_row(name, *costs(row, rows[SINGLE], METHODS[name].claim))
    console.print(table)
    table = new_table(
        "What they are worth",
        "of the mean of members' probabilities",
        *QUALITIES,
        caption="NLL in nats; ECE over 15 bins; shifted: the test images turned, moved and noisy",
    )
    for name, row in rows.items():
        table.add_row(name, *qualities(row))
    console.print(table)


def markdown(rows: dict[str, Row]) -> str:
    """One table, with what is claimed in brackets."""
    titles = [title.replace("\n", " ") for title in ("method", *COSTS.values(), *QUALITIES)]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for name, row in rows.items():
        measured = [getattr(row, cost) / getattr(rows[SINGLE], cost) for cost in COSTS]
        claims = [getattr(METHODS[name].claim, cost, "") for cost in COSTS]
        cells = [f"{value:.2f} ({claim})" if claim else f"{value:.2f}" for value, claim in zip(measured, claims)]
        lines.append([name, *cells, *qualities(row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: dict[str, Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained", sharey=True)
    single = rows[SINGLE]
    for axis, cost in zip(axes, ("training", "inference", "kept")):
        for n, (name, row) in enumerate(rows.items()):
            axis.scatter(
                getattr(row, cost) / getattr(single, cost), row.shifted_nll, marker="osD^vP*Xp<>hd8"[n % 14], s=60,
                label=name,
            )  # fmt: skip
        axis.set(xscale="log", xlabel={"kept": "memory kept"}.get(cost, f"{cost} time") + ", single networks")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("NLL of shifted images, nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)


def run(names: list[str], data: list[Images], args: argparse.Namespace) -> dict[str, Row]:
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
               TimeRemainingColumn())  # fmt: skip
    found: dict[str, list[Row]] = {name: [] for name in names}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=args.epochs * len(names) * args.seeds)
        for seed, images in enumerate(data):
            x_shifted = shifted(images, args.shift, seed)
            for name in names:
                progress.update(task, description=name)
                torch.manual_seed(seed)
                settings = Settings(args.members, args.hidden, args.epochs, args.batch, args.rate, seed=seed,
                                    tick=lambda: progress.advance(task))  # fmt: skip
                found[name].append(measured(METHODS[name].run(images, settings), images, x_shifted))
    return {name: median_of(rows) for name, rows in found.items()}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    try:
        data = [load(args.data, args.root, seed) for seed in range(args.seeds)]
    except RuntimeError as error:
        raise SystemExit(f"cost_table: {error}") from None
    names = [SINGLE, *(name for name in args.methods if name != SINGLE)]
    console.rule("[bold]Efficient ensembles: cost and quality")
    console.print(
        f"MLPs {data[0].num_features}-{args.hidden}-{args.hidden}-{data[0].num_classes}, {args.members} members, "
        f"{len(data[0].y_train):,} images of {data[0].name} in batches of {args.batch}, {args.epochs} epochs, "
        f"seeds: {args.seeds}\n"
        f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, threads: {args.threads}[/]"
    )
    rows = run(names, data, args)
    show(rows)
    plot(rows, args.output)
    table = args.output.with_suffix(".md")
    table.write_text(markdown(rows))
    console.print(f"wrote {args.output} and {table}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10", "cifar100"), default="digits", help="(%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="of CIFAR's files (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help="rows of the table: " + ", ".join(map(repr, METHODS)))  # fmt: skip
    parser.add_argument("--members", type=int, default=5, help="of the ensembles (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="width of both hidden layers (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images per step (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning (%(default)s)")
    parser.add_argument("--shift", type=float, default=0.5, help="strength of the shift (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("cost_table.png"), help="picture; the table is beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    args = parser.parse_args()
    for name in ("members", "hidden", "epochs", "batch", "seeds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} should be at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
