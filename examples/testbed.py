"""A testbed for uncertainty (Osband et al. 2021, "Epistemic Neural Networks"): data whose true posterior is known.

y = f(x) + eps with f a wide random ReLU network and eps normal.  As the network is wide, f is drawn from the Gaussian
process of such networks (NNGP, Lee et al. 2018), whose posterior given the data is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN_LAYERS, WIDTH = 2, 2048
WEIGHT_VARIANCE = 2.0  # times 1 / fan-in; no biases


class Setting(NamedTuple):
    """The paper's D_x, lambda and eps."""

    dimension: int
    ratio: int
    noise: float  # standard deviation of eps

    @property
    def size(self) -> int:
        return self.dimension * self.ratio


@dataclass(frozen=True)
class Part:
    """Inputs, and what is known of y there: the posterior of f given the training data, and y itself."""

    x: Tensor  # [T, D]
    y: Tensor  # [T]
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Testbed:
    setting: Setting
    x: Tensor
    y: Tensor
    validation: Part
    test: Part


def relu_moment(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """E[relu(u) relu(v)] of normal u, v with variances `first` and `second` and covariance `inner`."""
    scale = (first * second).sqrt()
    angle = (inner / scale.clamp(min=1e-300)).clamp(-1, 1).acos()
    return scale / (2 * math.pi) * (angle.sin() + (math.pi - angle) * angle.cos())


def nngp_kernel(a: Tensor, b: Tensor) -> Tensor:
    """[n, m], the covariance of a wide network's outputs for inputs a [n, D] and b [m, D]."""
    dimension = a.shape[1]
    inner = WEIGHT_VARIANCE * (a @ b.t()) / dimension
    first, second = (WEIGHT_VARIANCE * t.square().sum(1) / dimension for t in (a, b))
    for _ in range(HIDDEN_LAYERS):
        inner = WEIGHT_VARIANCE * relu_moment(inner, first[:, None], second[None, :])
        first, second = (WEIGHT_VARIANCE / 2 * t for t in (first, second))  # E[relu(u)^2] is half the variance
    return inner


def nngp_posterior(x: Tensor, y: Tensor, noise: float, at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of f at `at` [T, D], given y = f(x) + eps; in float64."""
    x, y, at = x.double(), y.double(), at.double()
    covariance = nngp_kernel(x, x) + noise**2 * torch.eye(len(x), dtype=x.dtype)
    factor = torch.linalg.cholesky(covariance)
    cross = nngp_kernel(x, at)
    mean = cross.t() @ torch.cholesky_solve(y[:, None], factor).squeeze(1)
    explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum(0)
    prior = WEIGHT_VARIANCE * at.square().sum(1) / at.shape[1] * (WEIGHT_VARIANCE / 2) ** HIDDEN_LAYERS
    return mean, (prior - explained).clamp(min=1e-12)


def random_function(dimension: int, generator: torch.Generator) -> list[Tensor]:
    """Weights of a wide random network."""
    widths = (dimension, *[WIDTH] * HIDDEN_LAYERS, 1)
    sizes = zip(widths[1:], widths)
    return [torch.randn(o, i, generator=generator) * (WEIGHT_VARIANCE / i) ** 0.5 for o, i in sizes]


def values(function: list[Tensor], x: Tensor) -> Tensor:
    for weight in function[:-1]:
        x = torch.relu(x @ weight.t())
    return (x @ function[-1].t()).squeeze(1)


def make(setting: Setting, seed: int, test_size: int = 500) -> Testbed:
    generator = torch.Generator().manual_seed(seed)
    function = random_function(setting.dimension, generator)

    def drawn(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, setting.dimension, generator=generator)
        return x, values(function, x) + setting.noise * torch.randn(size, generator=generator)

    x, y = drawn(setting.size)
    parts = []
    for _ in range(2):
        inputs, targets = drawn(test_size)
        mean, variance = nngp_posterior(x, y, setting.noise, inputs)
        parts.append(Part(inputs, targets, mean.float(), variance.float()))
    return Testbed(setting, x, y, *parts)
