"""What the optimizers' tests share: sample parameters and options, and the E optimizers of PyTorch to be equal to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effens_kernels import optim
from effens_kernels.testing import assert_accurate

MEMBERS = 3
OURS = {"sgd": optim.EnsembleSGD, "adamw": optim.EnsembleAdamW}
THEIRS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}

LR = [0.1, 0.003, 0.03]
DECAY = [0.0, 0.3, 0.01]
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": LR},
    "sgd-decay": {"lr": LR, "weight_decay": DECAY},
    "sgd-momentum": {"lr": LR, "momentum": [0.9, 0.5, 0.99], "dampening": [0.0, 0.5, 0.1]},
    "sgd-momentum-of_some": {"lr": 0.1, "momentum": [0.9, 0.0, 0.5], "dampening": [0.2, 0.2, 0.0]},
    "sgd-nesterov": {"lr": LR, "momentum": [0.9, 0.5, 0.99], "weight_decay": DECAY, "nesterov": True},
    "sgd-maximize": {"lr": LR, "momentum": 0.9, "weight_decay": DECAY, "dampening": [0.3, 0.0, 1.0], "maximize": True},
    "adamw": {"lr": LR, "eps": [1e-3, 1e-2, 1e-4]},
    "adamw-decay": {"lr": LR, "weight_decay": DECAY, "eps": 1e-3},
    "adamw-betas": {"betas": ([0.9, 0.0, 0.5], [0.999, 0.9, 0.0]), "lr": 0.01, "eps": [1e-3, 1e-2, 1e-4]},
    "adamw-amsgrad": {"lr": LR, "betas": (0.9, [0.9, 0.5, 0.99]), "amsgrad": True, "eps": 1e-3},
    "adamw-maximize": {
        "lr": LR,
        "weight_decay": DECAY,
        "betas": ([0.9, 0.8, 0.5], 0.99),
        "maximize": True,
        "eps": 1e-3,
    },
}
EVERYTHING = "sgd-nesterov", "sgd-momentum-of_some", "adamw-amsgrad"  # every branch of the kernels, or nearly
SHAPES = ((), (1,), (17,), (123,), (5, 3), (0, 4), (31, 1), (2, 3, 3, 3))
LAYOUTS = "contiguous", "channels_last", "members apart", "members inside", "members between", "gaps"


def own(option: object, member: int) -> Any:
    """What of a hyperparameter is a member's."""
    if isinstance(option, tuple):
        return tuple(own(o, member) for o in option)
    return option[member] if isinstance(option, (list, Tensor)) else option


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values, of another order in memory."""
    if layout == "channels_last" and t.dim() == 5:
        return t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "members apart":
        wide = t.new_zeros(2 * len(t), *t.shape[1:])
        wide[1::2] = t
        return wide[1::2]
    if layout == "members inside":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "members between" and t.dim() > 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        wide = t.new_zeros(*t.shape, 2)
        wide[..., 1] = t
        return wide[..., 1]
    return t.contiguous()


def values(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(MEMBERS, *shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


class Separate:
    """E models' parameters, each with an optimizer of PyTorch."""

    def __init__(self, kind: str, options: dict[str, Any], stacked: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.params = [[nn.Parameter(t[e].to(dtype, copy=True)) for t in stacked] for e in range(len(stacked[0]))]
        self.optimizers = [
            THEIRS[kind](params, **{name: own(option, e) for name, option in options.items()}, foreach=False)
            for e, params in enumerate(self.params)
        ]

    def step(self, grads: Sequence[Tensor | None], members: Sequence[int] | None = None) -> None:
        for e in range(len(self.params)) if members is None else members:
            for p, g in zip(self.params[e], grads):
                p.grad = None if g is None else g[e].to(p.dtype)
            self.optimizers[e].step()

    def stacked(self) -> list[Tensor]:
        return [torch.stack(each).detach() for each in zip(*self.params)]


def assert_equal(found: Sequence[Tensor], exact: Separate, composition: Separate | None = None, terms: int = 8) -> None:
    """By the tolerance rule; in float64 to rounding."""
    for n, (p, e) in enumerate(zip(found, exact.stacked())):
        if p.dtype == torch.float64:
            torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12, equal_nan=True)
        else:
            assert_accurate(p.detach().cpu(), e, composition.stacked()[n], f"params[{n}] {list(p.shape)}", terms)


def random_grads(params: Sequence[Tensor], layouts: Iterator[str] | None = None) -> list[Tensor]:
    grads = [torch.randn(p.shape, dtype=torch.float64).to(p.device, p.dtype) for p in params]
    return grads if layouts is None else [laid_out(g, next(layouts)) for g in grads]


def kind_of(name: str) -> str:
    return name.split("-")[0]


def build(name: str, params, backend: str | None = None, **changed):
    return OURS[kind_of(name)](params, **{**OPTIONS[name], **changed}, backend=backend)


def step(optimizer, params, grads) -> None:
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()
