"""The testbed of examples/layer_ensembles.py: its kernel, its posterior, and a short run of the whole example."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from common import ROOT

from examples import testbed
from examples.testbed import Setting, make, nngp_kernel, nngp_posterior, random_function, relu_moment, values

DOUBLE = {"dtype": torch.float64}


def test_relu_moment_is_an_expectation():
    """By quadrature of u = sqrt(a) z, v = r z + sqrt(b - r^2) w over normal z, w."""
    first, second, inner = 1.7, 0.6, -0.5
    grid = torch.linspace(-8, 8, 2001, **DOUBLE)
    weight = (-0.5 * grid.square()).exp() * (grid[1] - grid[0]) / (2 * torch.pi) ** 0.5
    u = first**0.5 * grid[:, None]
    v = inner / first**0.5 * grid[:, None] + (second - inner**2 / first) ** 0.5 * grid[None, :]
    expected = (u.relu() * v.relu() * weight[:, None] * weight[None, :]).sum()
    found = relu_moment(*(torch.tensor(t, **DOUBLE) for t in (inner, first, second)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_kernel_is_the_covariance_of_wide_networks(monkeypatch):
    monkeypatch.setattr(testbed, "WIDTH", 256)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, generator=generator)
    outputs = torch.stack([values(random_function(3, generator), x) for _ in range(3000)]).double()
    empirical = outputs.t() @ outputs / len(outputs)
    expected = nngp_kernel(x.double(), x.double())
    assert (empirical - expected).norm() < 0.1 * expected.norm()  # of 3,000 networks: 3 % expected


def test_diagonal_of_the_kernel():
    """E[relu(u)^2] = Var(u) / 2, layer by layer."""
    x = torch.randn(5, 4, **DOUBLE)
    expected = testbed.WEIGHT_VARIANCE * x.square().mean(1) * (testbed.WEIGHT_VARIANCE / 2) ** testbed.HIDDEN_LAYERS
    torch.testing.assert_close(nngp_kernel(x, x).diagonal(), expected, rtol=1e-6, atol=1e-9)


def test_posterior_by_the_formula():
    """m = k K^-1 y and v = k** - k K^-1 k, with an explicit inverse."""
    x, y, at = torch.randn(12, 3, **DOUBLE), torch.randn(12, **DOUBLE), torch.randn(5, 3, **DOUBLE)
    inverse = torch.linalg.inv(nngp_kernel(x, x) + 0.3**2 * torch.eye(12, **DOUBLE))
    cross = nngp_kernel(at, x)
    mean, variance = nngp_posterior(x, y, 0.3, at)
    torch.testing.assert_close(mean, cross @ inverse @ y, rtol=1e-6, atol=1e-8)
    expected = (nngp_kernel(at, at) - cross @ inverse @ cross.t()).diagonal()
    torch.testing.assert_close(variance, expected, rtol=1e-6, atol=1e-8)


def test_posterior_knows_what_it_has_seen():
    x, y = torch.randn(12, 3, **DOUBLE), torch.randn(12, **DOUBLE)
    mean, variance = nngp_posterior(x, y, 1e-4, x)
    torch.testing.assert_close(mean, y, rtol=1e-3, atol=1e-3)
    assert variance.max() < 1e-6
    assert nngp_posterior(x, y, 1e-4, 10 * torch.randn(5, 3, **DOUBLE))[1].max() > 1


def test_data():
    data = make(Setting(10, 5, 0.1), seed=0, test_size=40)
    assert data.x.shape == (50, 10)
    assert data.test.x.shape == (40, 10)
    assert not torch.equal(data.test.x, data.validation.x)
    normed = (data.test.y - data.test.mean) / (data.test.variance + 0.1**2).sqrt()  # y is as likely as it says
    assert 0.5 < normed.square().mean() < 2
    again = make(Setting(10, 5, 0.1), seed=0, test_size=40)
    assert torch.equal(again.test.mean, data.test.mean)


def test_example_runs(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--steps", "2", "--seeds", "1", "--options", "1", "2", "--members", "2", "--max-options", "2"]
    options += ["--images", "2", "--threads", "1", "--output", str(tmp_path / "plot.png")]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "layer_ensembles.py", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for words in ("Deep Ensemble of 2", "MC dropout", "Layer Ensemble, K = 2, ranked paths", "All K⁴ paths"):
        assert words in done.stdout
