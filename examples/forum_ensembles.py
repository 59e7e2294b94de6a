"""Two ensembles of MLPs written as Python loops, and the same two on effens_kernels: equal results, less time.

    python examples/forum_ensembles.py
    python examples/forum_ensembles.py --members 5 --heads 10 --hidden 256

1. checks that loop and fast model agree in outputs and gradients,
2. trains both on bootstrapped handwritten digits, and times forward, backward and update,
3. shows why the smaller of the two loop models has the slower backward pass.

The models are in forum_models.py.
"""

from __future__ import annotations

import argparse

import torch
from forum_data import Bootstrap, Digits
from forum_models import Ensemble1, Ensemble2, FastEnsemble1, FastEnsemble2, stacked
from forum_puzzle import BackwardProfile, UnboundEnsemble1, profile_backward
from forum_training import Trainee, evaluate, train_in_step
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import effens_kernels as ek


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    digits = Digits.load(args.seed)
    data = Bootstrap(digits, args.members, args.heads, args.batch, args.seed)
    sizes = (digits.num_features, args.hidden, digits.num_classes, args.heads, args.members)
    loops = {"Ensemble1": Ensemble1(*sizes), "Ensemble2": Ensemble2(*sizes)}
    fast = {"Ensemble1": FastEnsemble1(*sizes), "Ensemble2": FastEnsemble2(*sizes)}
    for name, model in loops.items():
        fast[name].load_state_dict(stacked(model))

    console.rule("[bold]Ensembles of MLPs: a Python loop, and effens_kernels")
    console.print(
        f"{args.members} members with {args.heads} heads each, {digits.num_features}-{args.hidden}-{args.hidden}-"
        f"{args.hidden}-{digits.num_classes}, batches of {args.batch} rows per member\n"
        "Ensemble1: one trunk for all members, own heads.   Ensemble2: one whole network per member.\n"
        f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, threads: {args.threads}[/]"
    )
    x = torch.randn(args.batch, args.members, digits.num_features)
    show_agreement({name: largest_differences(loops[name], fast[name], x) for name in loops})

    trainees = [
        Trainee(f"{name}, {way}", model[name])
        for name in loops
        for way, model in (("loop", loops), ("effens_kernels", fast))
    ]
    train(trainees, data, args.epochs)
    show_training(trainees)
    show_quality(trainees, digits, args.members)

    unbound = UnboundEnsemble1(*sizes)
    unbound.load_state_dict(loops["Ensemble1"].state_dict())
    models = {
        "Ensemble1, loop": loops["Ensemble1"],
        "Ensemble1, loop with unbind": unbound,
        "Ensemble1, effens_kernels": fast["Ensemble1"],
        "Ensemble2, loop": loops["Ensemble2"],
    }
    show_puzzle(profile_backward(models, x), models)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10, help="networks in the ensemble (%(default)s)")
    parser.add_argument("--heads", type=int, default=5, help="output layers per member (%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="width of the three hidden layers (%(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the digits (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="rows per member and step (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and bootstrap samples (%(default)s)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name != "seed" and value < 1:
            parser.error(f"--{name} should be at least 1, got {value}")
    if args.batch > 1024:
        parser.error(f"--batch should be at most 1024, since there are few digits; got {args.batch}")
    return args


# -------------------------------------------------------------------------------------------------- 1. agreement


def largest_differences(
    loop: Ensemble1 | Ensemble2, fast: FastEnsemble1 | FastEnsemble2, x: Tensor
) -> tuple[float, float]:
    """Of the outputs, and of the gradients of all parameters for a random output gradient; relative to the largest."""
    y_loop, y_fast = loop(x), fast(x)
    gradient = torch.randn_like(y_loop)
    y_loop.backward(gradient)
    y_fast.backward(gradient)
    gradients = dict(fast.named_parameters())
    pairs = [(g, gradients[name].grad) for name, g in stacked(loop, lambda p: p.grad).items()]
    return _difference(y_loop, y_fast), max(_difference(*pair) for pair in pairs)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def show_agreement(differences: dict[str, tuple[float, float]]) -> None:
    table = new_table(
        "1. Equal results: largest relative difference of loop and effens_kernels", "model", "outputs", "gradients"
    )
    for name, values in differences.items():
        table.add_row(name, *(f"{value:.1e}" for value in values))
    console.print(table)


# --------------------------------------------------------------------------------------------------- 2. training


def train(trainees: list[Trainee], data: Bootstrap, epochs: int) -> None:
    columns = (
        TextColumn("training {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{len(trainees)} models in step", total=epochs * len(data), loss=float("nan"))
        train_in_step(trainees, data, epochs, lambda: progress.update(task, advance=1, loss=trainees[-1].loss))


def show_training(trainees: list[Trainee]) -> None:
    table = new_table(
        "2. Training on handwritten digits, median ms of a step",
        "model",
        "parameters",
        "forward",
        "backward",
        "Adam",
        "step",
        "speedup",
    )
    loop_step = 0.0
    for trainee in trainees:
        times = trainee.milliseconds
        step, is_loop = sum(times), trainee.name.endswith("loop")
        loop_step = step if is_loop else loop_step
        table.add_row(
            trainee.name,
            f"{trainee.num_parameters:,}",
            *(f"{t:.2f}" for t in (*times, step)),
            "" if is_loop else f"[green]{loop_step / step:.1f} x[/]",
            end_section=not is_loop,
            style="" if is_loop else "bold",
        )
    console.print(table)


def show_quality(trainees: list[Trainee], digits: Digits, members: int) -> None:
    table = new_table(
        f"   and their quality on {len(digits.y_test)} digits that none has seen",
        "model",
        "accuracy of\na member",
        "accuracy of\nthe ensemble",
        "disagreement\nwhere right",
        "disagreement\nwhere wrong",
        caption="disagreement: mutual information of prediction and member, in nats",
    )
    for trainee in trainees:
        quality = evaluate(trainee.model, digits, members)
        table.add_row(
            trainee.name,
            f"{quality.member_accuracy:.1%}",
            f"{quality.ensemble_accuracy:.1%}",
            f"{quality.disagreement_when_right:.3f}",
            f"{quality.disagreement_when_wrong:.3f}",
            end_section=not trainee.name.endswith("loop"),
        )
    console.print(table)


# ----------------------------------------------------------------------------------------------------- 3. puzzle


def show_puzzle(profiles: dict[str, BackwardProfile], models: dict[str, torch.nn.Module]) -> None:
    table = new_table(
        "3. The backward pass by itself, and the shares of its time",
        "model",
        "parameters",
        "backward\nms",
        "slices",
        "zeros\nMB",
        "filling\nzeros",
        "additions",
        "products",
    )
    for name, p in profiles.items():
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        table.add_row(
            name,
            f"{parameters:,}",
            f"{p.milliseconds:.2f}",
            f"{p.slices}",
            f"{p.megabytes_of_zeros:.1f}",
            *(f"{share:.0%}" for share in (p.zero_fill, p.additions, p.products)),
            style="bold" if name.endswith("effens_kernels") else "",
        )
    console.print(table)
    loop, unbound, fast = (profiles[f"Ensemble1, {way}"] for way in ("loop", "loop with unbind", "effens_kernels"))
    other = profiles["Ensemble2, loop"]
    console.print(
        f"The backward pass of Ensemble1 takes {loop.milliseconds:.2f} ms, that of Ensemble2, with more parameters, "
        f"{other.milliseconds:.2f} ms. Why? Each head of Ensemble1 reads x\\[:, e, :], and backward makes of each such "
        f"slice a gradient of the size of all members' features, zero except for one member, to add them all up: "
        f"{loop.slices} slices, {loop.megabytes_of_zeros:.1f} MB of zeros, {loop.zero_fill:.0%} of the time in filling "
        f"them and {loop.additions:.0%} in additions. (Ensemble2 slices its input, which needs no gradient.) Slicing "
        f"once with x.unbind(1) takes backward to {unbound.milliseconds:.2f} ms; one product for all heads, as in "
        f"EnsembleMLP, to {fast.milliseconds:.2f} ms.",
        width=min(console.width, 100),
    )


if __name__ == "__main__":
    main()
