"""Networks with options, as modules of torch.nn, and their evaluation path by path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from effens_kernels.nn import LayerEnsemble

DOUBLE = {"dtype": torch.float64}

Options = list[list[nn.Module]]
B = 6


class Residual(nn.Module):
    """No kind that LayerEnsemble knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Overwriting(nn.Module):
    """Changes what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.activation = nn.Linear(width, width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.activation(x))


def mlp(*widths: int, counts: Sequence[int], act: Callable[[], nn.Module] = nn.ReLU, norm=None, bias=True) -> Options:
    layers: Options = []
    for n, (i, o, count) in enumerate(zip(widths, widths[1:], counts)):
        last = n == len(counts) - 1

        def option(i: int = i, o: int = o, last: bool = last) -> nn.Module:
            after = [] if last else ([norm(o)] if norm else []) + [act()]
            return nn.Sequential(nn.Linear(i, o, bias), *after)

        layers.append([option() for _ in range(count)])
    return layers


def convolution(i: int, o: int, *after: Callable[[], nn.Module], **how) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(i, o, 3, **{"padding": 1, **how}), *[make() for make in after])


def cnn(*, norm=nn.Identity, counts: Sequence[int] = (2, 3, 2, 3), **how) -> Options:
    makes = (
        convolution(2, 4, lambda: norm(4), nn.ReLU, lambda: nn.MaxPool2d(2), **how),
        convolution(4, 6, lambda: norm(6), nn.SiLU, **how),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6 * 4 * 4, 5), nn.Tanh()),
        lambda: nn.Linear(5, 3),
    )
    return [[make() for _ in range(count)] for make, count in zip(makes, counts)]


def mixed() -> Options:
    """Options of one layer that are made of different modules."""
    return [
        [
            nn.Sequential(nn.Linear(5, 4), nn.ReLU()),
            nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh()),
            nn.Linear(5, 4),
        ],
        [Residual(4), Residual(4)],
        [nn.Sequential(nn.PReLU(), nn.Linear(4, 3)) for _ in range(2)],
    ]


VECTOR, IMAGE = (5,), (2, 8, 8)
CASES: dict[str, tuple[Callable[[], Options], tuple[int, ...]]] = {
    "linear": (lambda: mlp(5, 4, 3, counts=(3, 2)), VECTOR),
    "no-bias": (lambda: mlp(5, 4, 3, counts=(3, 2), bias=False), VECTOR),
    **{
        act.__name__: (lambda act=act: mlp(5, 4, 6, 3, counts=(2, 3, 2), act=act), VECTOR)
        for act in (nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.Sigmoid)
    },
    "gelu-tanh": (lambda: mlp(5, 4, 3, counts=(3, 2), act=lambda: nn.GELU("tanh")), VECTOR),
    "in-place": (lambda: mlp(5, 4, 6, 3, counts=(3, 2, 3), act=lambda: nn.ReLU(inplace=True)), VECTOR),
    "in-place-first": (
        lambda: [[nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4)) for _ in range(3)], *mlp(4, 3, counts=(2,))],
        VECTOR,
    ),
    "overwriting": (lambda: [[Overwriting(5) for _ in range(3)] for _ in range(2)], VECTOR),
    "trunk": (lambda: mlp(5, 4, 6, 3, counts=(1, 1, 4)), VECTOR),
    "trunk-in-between": (lambda: mlp(5, 4, 6, 6, 3, counts=(3, 1, 2, 1)), VECTOR),
    "one-layer": (lambda: mlp(5, 3, counts=(4,)), VECTOR),
    "one-path": (lambda: mlp(5, 4, 3, counts=(1, 1)), VECTOR),
    "batch-norm": (lambda: mlp(5, 4, 6, 3, counts=(3, 2, 2), norm=nn.BatchNorm1d), VECTOR),
    "batch-norm-plain": (
        lambda: mlp(5, 4, 3, counts=(3, 2), norm=lambda n: nn.BatchNorm1d(n, affine=False, momentum=None)),
        VECTOR,
    ),
    "batch-norm-untracked": (
        lambda: mlp(5, 4, 3, counts=(3, 2), norm=lambda n: nn.BatchNorm1d(n, track_running_stats=False)),
        VECTOR,
    ),
    "batch-norm-first": (
        lambda: [[nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)) for _ in range(3)], *mlp(4, 3, counts=(2,))],
        VECTOR,
    ),
    "layer-norm": (lambda: mlp(5, 4, 6, 3, counts=(3, 1, 2), norm=nn.LayerNorm), VECTOR),
    "layer-norm-plain": (
        lambda: mlp(5, 4, 3, counts=(3, 2), norm=lambda n: nn.LayerNorm(n, elementwise_affine=False)),
        VECTOR,
    ),
    "layer-norm-no-bias": (lambda: mlp(5, 4, 3, counts=(3, 2), norm=lambda n: nn.LayerNorm(n, bias=False)), VECTOR),
    "group-norm": (lambda: mlp(5, 4, 3, counts=(3, 2), norm=lambda n: nn.GroupNorm(2, n)), VECTOR),
    "tokens": (lambda: mlp(5, 4, 6, 3, counts=(3, 2, 2), norm=nn.LayerNorm), (7, 5)),
    "two-linear": (
        lambda: [
            [nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5)) for _ in range(3)],
            *mlp(5, 3, counts=(2,)),
        ],
        VECTOR,
    ),
    "parameter-free": (lambda: [[nn.Tanh(), nn.Tanh()], *mlp(5, 3, counts=(2,)), [nn.Softplus()]], VECTOR),
    "conv": (cnn, IMAGE),
    "conv-batch-norm": (lambda: cnn(norm=nn.BatchNorm2d), IMAGE),
    "conv-group-norm": (lambda: cnn(norm=lambda n: nn.GroupNorm(2, n)), IMAGE),
    "conv-groups-circular": (lambda: cnn(groups=2, padding_mode="circular"), IMAGE),
    "conv-no-bias-same": (lambda: cnn(bias=False, padding="same", dilation=2), IMAGE),
    "conv-last": (
        lambda: [
            [convolution(2, 3, nn.ReLU)() for _ in range(2)],
            [convolution(3, 4, stride=2)() for _ in range(3)],
        ],
        IMAGE,
    ),
    "conv1d": (
        lambda: [
            [nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(2)],
            [nn.Sequential(nn.Flatten(), nn.Linear(4 * 5, 2)) for _ in range(3)],
        ],
        (3, 7),
    ),
    "pool-first": (
        lambda: [[nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU()) for _ in range(2)], [nn.Flatten()]],
        IMAGE,
    ),
    "mixed": (mixed, VECTOR),
    "other-with-batch-norm": (
        lambda: [
            [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4))],
            [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(4, 3)],
        ],
        VECTOR,
    ),
}


def made(case: str) -> tuple[Options, LayerEnsemble, Tensor]:
    """Modules with random values, the ensemble of them, and an input; float64."""
    make, shape = CASES[case]
    options = make()
    for layer in options:
        for option in layer:
            option.double()
            for p in option.parameters():
                p.data.normal_(std=0.7)
            for name, buffer in option.named_buffers():
                if "running" in name:
                    buffer.uniform_(0.5, 1.5)
    return options, LayerEnsemble(options), torch.randn(B, *shape, dtype=torch.float64)


def naive(options: Options, x: Tensor, samples: Tensor) -> Tensor:
    """Every path on its own, module by module."""
    results = []
    for path in samples.tolist():
        y = x.clone()
        for layer, k in zip(options, path):
            y = layer[k](y)
        results.append(y)
    return torch.stack(results)


def pairs(options: Options, model: LayerEnsemble) -> list[tuple[nn.Parameter, int | None, nn.Parameter]]:
    """Parameters of the model, the option in those that are stacked, and the modules' parameters that they began as.

    To be found by their values, which are random.
    """
    originals = [p for layer in options for option in layer for p in option.parameters()]
    found = []
    for name, parameter in model.named_parameters():
        stacked = ".options." not in name
        for k, value in enumerate(parameter) if stacked else [(None, parameter)]:
            (original,) = [p for p in originals if p.shape == value.shape and torch.equal(p, value)]
            found.append((parameter, k, original))
    assert len(found) == len(originals)
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def sample_sets(model: LayerEnsemble) -> dict[str, Tensor]:
    """Sorted, unsorted, repeated and single ones."""
    every = model.all_paths()
    return {
        "all": every,
        "shuffled": every[torch.randperm(len(every))],
        "some": model.sample(max(1, len(every) // 2)),
        "repeated": model.sample(2 * len(every), unique=False),
        "one": every[-1:],
        "one, twice": every[:1].repeat(2, 1),
        "diagonal-like": every[:: max(1, len(every) // 3)],
    }


def network() -> nn.Sequential:
    """A network with norms and dropout, to make ensembles of."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 7),
        nn.Tanh(),
        nn.Dropout(0.1),
        nn.Linear(7, 3),
    )
