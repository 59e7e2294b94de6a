"""Layer Ensembles: uncertainty against the exact posterior, and inference that computes each shared prefix once.

    python examples/layer_ensembles.py
    python examples/layer_ensembles.py --full --steps 2000      # the paper's grid: hours

Two experiments of Oleksienko and Iosifidis 2022.  First a testbed whose true posterior is known: y = f(x) + eps with a
random network f.  Layer Ensembles, Deep Ensembles and MC dropout are scored by the KL divergence of their predictive
distribution of y from the true one (smaller is better), also after the paths are ranked on validation data (figures 2
and 4).  Then a CNN of four layers with K options each, all K^4 paths on digit images: time, and peak memory of
activations, of paths one by one, of all side by side, and of shared prefixes (figure 3).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, median, pstdev
from time import perf_counter

import torch
from activation_memory import ActivationMemory
from image_data import load
from layer_ensemble_models import cnn, mlp
from printing import console, new_table
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from testbed import Part, Setting, Testbed, make
from torch import Tensor, nn

import effens_kernels as ek

SMALL = [Setting(*values) for values in product((10,), (1, 10), (0.1, 1.0))]
FULL = [Setting(*values) for values in product((10, 100, 1000), (1, 10, 100), (0.01, 0.1, 1.0))]
WIDTH = 50  # of the two hidden layers
DEEP = "Deep Ensembles"
SECONDS = 0.3  # of timing for each way of inference


# ------------------------------------------------------------------------------------------------- the testbed's models


def network(dimension: int, dropout: float = 0.0) -> nn.Sequential:
    return mlp(dimension, WIDTH, 1, dropout)


def train(model: nn.Module, run: Callable[[Tensor], Tensor], data: Testbed, args: argparse.Namespace) -> None:
    """`run` gives [S, B, 1] of some networks; their mean squared error is the loss."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        rows = torch.randperm(len(data.x), generator=generator)[: args.batch]
        optimizer.zero_grad()
        prediction = run(data.x[rows]).squeeze(-1)
        (prediction - data.y[rows]).square().mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    model.eval()


def quality(part: Part, setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """KL of predictive distributions of y, whose variance is that of the networks' outputs and the noise."""
    noise = setting.noise**2
    return lambda mean, variance: ek.ensembles.gaussian_kl(mean, variance + noise, part.mean, part.variance + noise)


def score_of(outputs: Tensor, part: Part, setting: Setting) -> float:
    """Of the networks whose outputs are [P, T]."""
    moments = outputs.mean(0, keepdim=True), outputs.var(0, unbiased=False, keepdim=True)
    return quality(part, setting)(*moments).item()


@dataclass
class Findings:
    """KL on test data, one value for each setting and seed."""

    methods: dict[str, list[float]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    networks: dict[str, list[int]] = field(default_factory=dict)  # how many are run
    curves: dict[tuple[str, int], dict[int, list[float]]] = field(default_factory=dict)  # over the number of networks

    def add(self, name: str, value: float, model: nn.Module, networks: int) -> None:
        self.methods.setdefault(name, []).append(value)
        self.parameters[name] = sum(p.numel() for p in model.parameters())
        self.networks.setdefault(name, []).append(networks)

    def add_point(self, kind: str, options: int, networks: int, value: float) -> None:
        self.curves.setdefault((kind, options), {}).setdefault(networks, []).append(value)


@torch.no_grad()
def outputs_of(model: ek.nn.LayerEnsemble, paths: Tensor, part: Part) -> Tensor:
    return model(part.x, paths).squeeze(-1)


def run_deep_ensembles(data: Testbed, found: Findings, args: argparse.Namespace) -> None:
    for prior in (args.prior_scale, None):
        model = ek.nn.LayerEnsemble.deep_ensemble(network(data.setting.dimension), args.members, prior_scale=prior)
        train(model, model, data, args)
        outputs = outputs_of(model, model.samples, data.test)
        if prior is not None:
            for count in range(1, args.members + 1):
                found.add_point(DEEP, 1, count, score_of(outputs[:count], data.test, data.setting))
            few = max(args.options)
            if few < args.members:
                name = f"Deep Ensemble of {few}"
                found.add(name, score_of(outputs[:few], data.test, data.setting), model, few)
                found.parameters[name] = found.parameters[name] * few // args.members
        name = f"Deep Ensemble of {args.members}" + ", no prior" * (prior is None)
        found.add(name, score_of(outputs, data.test, data.setting), model, args.members)


def run_layer_ensembles(data: Testbed, options: int, found: Findings, args: argparse.Namespace) -> None:
    largest = options == max(args.options)
    for prior in (args.prior_scale, None) if largest else (args.prior_scale,):
        model = ek.nn.LayerEnsemble.from_model(network(data.setting.dimension), options, prior_scale=prior)
        generator = torch.Generator().manual_seed(args.seed)
        # Each step another few paths: in time, every option is trained beside every other.
        train(model, lambda x, m=model, g=generator: m(x, m.sample(options, generator=g)), data, args)
        paths = model.all_paths()
        outputs = outputs_of(model, paths, data.test)
        name = f"Layer Ensemble, K = {options}"
        every = score_of(outputs, data.test, data.setting)
        if prior is None:
            found.add(f"{name}, all {len(paths)} paths, no prior", every, model, len(paths))
            continue
        shuffled = outputs[torch.randperm(len(paths), generator=generator)]
        for count in counts(len(paths)):
            found.add_point("random", options, count, score_of(shuffled[:count], data.test, data.setting))
        ranking = ek.ensembles.rank_paths(
            outputs_of(model, paths, data.validation), quality(data.validation, data.setting)
        )
        ranked = outputs[ranking.order]
        for count in counts(len(paths)):
            found.add_point("ranked", options, count, score_of(ranked[:count], data.test, data.setting))
        if largest:
            found.add(f"{name}, all {len(paths)} paths", every, model, len(paths))
            chosen = ranking.best_size
            best = score_of(ranked[:chosen], data.test, data.setting)
            found.add(f"{name}, ranked paths", best, model, chosen)


def run_dropout(data: Testbed, found: Findings, args: argparse.Namespace) -> None:
    model = network(data.setting.dimension, args.dropout)
    train(model, lambda x: model(x).unsqueeze(0), data, args)
    model.train()  # dropout stays on: each pass is another network
    with torch.no_grad():
        outputs = torch.stack([model(data.test.x).squeeze(-1) for _ in range(args.members)])
    found.add("MC dropout", score_of(outputs, data.test, data.setting), model, args.members)


def counts(total: int) -> list[int]:
    """Numbers of networks to show: every one of the first, then ever fewer."""
    found, count = [], 1
    while count < total:
        found.append(count)
        count = max(count + 1, int(count * 1.25))
    return [*found, total]


def run_testbed(args: argparse.Namespace) -> Findings:
    found = Findings()
    settings = [s for s in (FULL if args.full else SMALL) if s.size <= args.max_size]
    skipped = len(FULL if args.full else SMALL) - len(settings)
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("data sets"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(settings) * args.seeds)
        for setting, seed in product(settings, range(args.seeds)):
            progress.update(task, description=f"D {setting.dimension}, λ {setting.ratio}, ε {setting.noise:g}")
            torch.manual_seed(args.seed + seed)
            data = make(setting, args.seed + seed)
            run_deep_ensembles(data, found, args)
            run_dropout(data, found, args)
            for options in args.options:
                run_layer_ensembles(data, options, found, args)
            progress.advance(task)
    if skipped:
        console.print(f"[yellow]left out: {skipped} settings of more than {args.max_size:,} rows (--max-size)")
    return found


def show_testbed(found: Findings) -> None:
    table = new_table(
        "Uncertainty on test data, against the exact posterior",
        "method",
        "parameters",
        "networks",
        "KL",
        "± std",
        caption="KL of the predictive distribution of y from the true one, in nats, smaller is better;\n"
        "mean and standard deviation over data sets; networks: how many are run (median)",
    )
    for name, scores in sorted(found.methods.items(), key=lambda item: mean(item[1])):
        table.add_row(
            name,
            f"{found.parameters[name]:,}",
            f"{median(found.networks[name]):g}",
            f"{mean(scores):.4f}",
            f"{pstdev(scores):.4f}",
            style="bold" if name.startswith("Layer") else "",
        )
    console.print(table)


# ----------------------------------------------------------------------------------------------- inference of all paths


@dataclass(frozen=True)
class Inference:
    options: int
    paths: int
    layers: float  # as many layers as have to be computed, path by path over prefix by prefix
    seconds: dict[str, float]
    peak: dict[str, int]  # bytes of activations


ONE_BY_ONE, SIDE_BY_SIDE, SHARED = "one by one", "side by side", "shared"


def ways(model: ek.nn.LayerEnsemble, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All paths, in three ways."""
    paths = model.all_paths()
    options = [[layer.plain(k) for k in range(layer.num_options)] for layer in model.layers]

    def one_by_one() -> Tensor:
        results = []
        for path in paths.tolist():
            y = x
            for layer, k in zip(options, path):
                y = layer[k](y)
            results.append(y)
        return torch.stack(results)

    plain = model.path([0] * len(options)).to("meta")
    stacked = {
        f"{q}.{name}": torch.stack([dict(option.named_parameters())[name].detach() for option in layer])[paths[:, q]]
        for q, layer in enumerate(options)
        for name, _ in layer[0].named_parameters()
    }
    side_by_side = torch.func.vmap(lambda p: torch.func.functional_call(plain, p, (x,)))
    return {ONE_BY_ONE: one_by_one, SIDE_BY_SIDE: lambda: side_by_side(stacked), SHARED: lambda: model(x, paths)}


@torch.no_grad()
def run_inference(options: int, x: Tensor) -> Inference:
    model = ek.nn.LayerEnsemble.from_model(cnn(), options).eval()
    seconds, peak, expected = {}, {}, None
    for name, run in ways(model, x).items():
        with ActivationMemory() as memory:
            y = run()
        expected = y if expected is None else expected
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
        peak[name] = memory.peak
        seconds[name] = measured(run)
    prefixes = sum(model.tree(model.all_paths()).num_prefixes)
    return Inference(options, model.num_paths, model.num_paths * 4 / prefixes, seconds, peak)


def measured(run: Callable[[], Tensor]) -> float:
    """Median seconds of a call."""
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        begin = perf_counter()
        run()
        times.append(perf_counter() - begin)
    return median(times)


def show_inference(found: list[Inference], batch: int) -> None:
    ways = [column for name in (ONE_BY_ONE, SIDE_BY_SIDE, SHARED) for column in (f"{name},\nms", "MB")]
    table = new_table(
        f"All K⁴ paths of a CNN of four layers, {batch} images of digits",
        "K",
        "paths",
        "fewer\nlayers",
        *ways,
        "faster than\none by one",
        "than side\nby side",
        "less memory than\nside by side",
        caption="MB: most bytes of activations alive at once; without weights, and without what an operation needs "
        "inside itself",
    )
    for row in found:
        cells = [str(row.options), f"{row.paths:,}", f"{row.layers:.1f} x"]
        for name in (ONE_BY_ONE, SIDE_BY_SIDE, SHARED):
            cells += [f"{row.seconds[name] * 1e3:.1f}", f"{row.peak[name] / 1e6:.1f}"]
        faster = [f"{row.seconds[name] / row.seconds[SHARED]:.1f} x" for name in (ONE_BY_ONE, SIDE_BY_SIDE)]
        table.add_row(*cells, *faster, f"{row.peak[SIDE_BY_SIDE] / row.peak[SHARED]:.1f} x")
    console.print(table)


# ------------------------------------------------------------------------------------------------------------ the plot


def plot(testbed: Findings, inference: list[Inference], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for axis, kind, title in ((axes[0], "random", "paths at random"), (axes[1], "ranked", "paths ranked")):
        for (which, options), points in testbed.curves.items():
            if which not in (kind, DEEP):
                continue
            x, middle = list(points), [mean(scores) for scores in points.values()]
            spread = [pstdev(scores) / len(scores) ** 0.5 for scores in points.values()]
            label = DEEP if which == DEEP else f"Layer Ensemble, K = {options}"
            (line,) = axis.plot(x, middle, "k--" if which == DEEP else "-", label=label)
            low, high = ([m + sign * s for m, s in zip(middle, spread)] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
        axis.set(xlabel="networks that are run", ylabel="KL from the true posterior, nats", title=title)
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    ks = [row.options for row in inference]
    for name in (ONE_BY_ONE, SIDE_BY_SIDE):
        axes[2].plot(
            ks, [row.seconds[name] / row.seconds[SHARED] for row in inference], marker="o", label=f"than {name}"
        )
        axes[3].plot(ks, [row.peak[name] / 1e6 for row in inference], marker="o", label=name)
    axes[2].plot(ks, [row.layers for row in inference], "k:", label="fewer layers")
    axes[3].plot(ks, [row.peak[SHARED] / 1e6 for row in inference], marker="o", label=SHARED)
    axes[2].set(xlabel="options per layer, K", ylabel="times faster", title="time of all K⁴ paths")
    axes[3].set(
        xlabel="options per layer, K", ylabel="peak of activations, MB", yscale="log", title="memory of all K⁴ paths"
    )
    for axis in axes[2:]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    console.rule("[bold]Layer Ensembles: many networks of few layers")
    console.print(f"[dim]effens_kernels {ek.__version__}, torch {torch.__version__}, threads: {args.threads}[/]")
    digits = load("digits", Path("data"), args.seed)
    x = digits.x_test[: args.images].unflatten(1, digits.shape)
    inference = [run_inference(options, x) for options in range(1, args.max_options + 1)]
    show_inference(inference, len(x))
    testbed = run_testbed(args)
    show_testbed(testbed)
    plot(testbed, inference, args.output)
    console.print(f"wrote {args.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the paper's grid of D, λ and ε, and 10 seeds")
    parser.add_argument(
        "--max-size", type=int, default=10_000, help="rows of a data set: the posterior takes their cube"
    )
    parser.add_argument("--seeds", type=int, help="data sets of each setting (2, or 10 with --full)")
    parser.add_argument("--options", type=int, nargs="+", default=[2, 3, 5], help="K of the Layer Ensembles")
    parser.add_argument(
        "--members", type=int, default=10, help="of the Deep Ensemble, and passes of dropout (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="rows per step (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-2, help="of learning, at the start (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="(%(default)s)")
    # torch.nn's networks of this size give outputs of standard deviation 0.13, and f has 1.4.
    parser.add_argument("--prior-scale", type=float, default=10.0, help="of the untrained twins (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="probability (%(default)s)")
    parser.add_argument("--images", type=int, default=16, help="of digits, for inference (%(default)s)")
    parser.add_argument("--max-options", type=int, default=6, help="K up to which inference is shown (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("layer_ensembles.png"), help="the plot (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, parameters and paths (%(default)s)")
    args = parser.parse_args()
    args.seeds = (10 if args.full else 2) if args.seeds is None else args.seeds
    for name in ("seeds", "members", "steps", "batch", "images", "max_options", "max_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} should be at least 1, got {getattr(args, name)}")
    if min(args.options) < 1:
        parser.error(f"--options should be at least 1, got {min(args.options)}")
    return args


if __name__ == "__main__":
    main()
