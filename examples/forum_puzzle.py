"""Where the backward pass of a model spends its time, from PyTorch's profiler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from statistics import median
from time import perf_counter

import torch
from forum_models import Ensemble1
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ZERO_FILL = {"aten::zero_", "aten::fill_"}
OURS = {"effens_kernels_native::grouped_linear_bwd", "effens_kernels_native::ensemble_mlp_bwd"}
PRODUCTS = {"aten::mm", "aten::bmm", "aten::baddbmm", "aten::addmm", *OURS}


class UnboundEnsemble1(Ensemble1):
    """Ensemble1 with the features taken apart once by `unbind`, whose backward is one `stack` without zeros."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.features(x).unbind(1), self.ensemble, strict=True)
        members = [torch.stack([head(features) for head in heads], dim=1) for features, heads in pairs]
        return torch.stack(members, dim=1)


@dataclass(frozen=True)
class BackwardProfile:
    """One backward pass; shares are of the time that the profiler saw in PyTorch operations."""

    milliseconds: float  # measured without the profiler
    slices: int
    megabytes_of_zeros: float
    zero_fill: float
    additions: float
    products: float


def profile_backward(models: dict[str, nn.Module], x: Tensor, repeats: int = 15) -> dict[str, BackwardProfile]:
    """Time the models' backward passes in turns, then profile each once."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            times[name].append(_backward(model, x))
    return {name: _profile(model, x, median(times[name]) * 1e3) for name, model in models.items()}


def _backward(model: nn.Module, x: Tensor) -> float:
    model.zero_grad()
    y = model(x)
    gradient = torch.randn_like(y)
    begin = perf_counter()
    y.backward(gradient)
    return perf_counter() - begin


def _profile(model: nn.Module, x: Tensor, milliseconds: float) -> BackwardProfile:
    model.zero_grad()
    y = model(x)
    gradient = torch.randn_like(y)
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        y.backward(gradient)
    events = recorded.key_averages(group_by_input_shape=True)
    total = sum(event.self_cpu_time_total for event in events)

    def share(names: set[str]) -> float:
        return sum(event.self_cpu_time_total for event in events if event.key in names) / total

    filled = sum(event.count * prod(event.input_shapes[0]) for event in events if event.key == "aten::zero_")
    return BackwardProfile(
        milliseconds=milliseconds,
        slices=sum(event.count for event in events if event.key == "aten::select_backward"),
        megabytes_of_zeros=filled * x.element_size() / 1e6,
        zero_fill=share(ZERO_FILL),
        additions=share({"aten::add", "aten::add_"}),
        products=share(PRODUCTS),
    )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ side logs its stages to the terminal, whatever the log level."""
    saved = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
