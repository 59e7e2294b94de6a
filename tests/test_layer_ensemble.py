"""LayerEnsemble equals its paths run one by one, in values, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_ensemble_cases import CASES, DOUBLE, B, close, cnn, made, mlp, naive, pairs, sample_sets
from torch import Tensor, nn

from effens_kernels.nn import LayerEnsemble
from effens_kernels.nn.layer_ensemble import layer as layer_file

cases = pytest.mark.parametrize("case", CASES)


def numbers_of(samples: Tensor, num_options: tuple[int, ...]) -> Tensor:
    """Where paths are among all of them."""
    numbers = torch.zeros(len(samples), dtype=torch.long)
    for options, count in zip(samples.unbind(1), num_options):
        numbers = numbers * count + options
    return numbers


@cases
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_every_path(case, training, grad):
    options, model, x = made(case)
    for module in (model, *[m for layer in options for m in layer]):
        module.train(training)
    expected = naive(options, x, model.all_paths())
    for samples in sample_sets(model).values():
        before = x.clone()
        with torch.set_grad_enabled(grad):
            close(model(x, samples), expected[numbers_of(samples, model.num_options)])
        assert torch.equal(x, before)


@pytest.mark.parametrize("paths", [[[0, 1], [1, 2], [2, 0]], [[2, 0], [0, 1], [1, 2]], [[1, 1], [0, 0], [2, 2]]])
def test_paths_that_share_nothing(paths):
    """As a Deep Ensemble's, but of other options or in another order."""
    model, x, samples = (
        LayerEnsemble(mlp(5, 4, 3, counts=(3, 3))).double(),
        torch.randn(B, 5, **DOUBLE),
        torch.tensor(paths),
    )
    close(model(x, samples), torch.stack([model.path(path)(x) for path in samples]))


@cases
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("which", ["shuffled", "repeated"])
def test_gradients(case, training, which):
    options, model, x = made(case)
    for module in (model, *[m for layer in options for m in layer]):
        module.train(training)
    samples = sample_sets(model)[which]
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y = model(mine, samples)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (naive(options, theirs, samples) * weights).sum().backward()
    close(mine.grad, theirs.grad)
    for parameter, k, original in pairs(options, model):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(original) if original.grad is None else original.grad
        close(grad if k is None else grad[k], expected)


@cases
def test_results_of_a_step_of_training_are_deterministic(case):
    _, model, x = made(case)
    samples = model.sample(min(5, model.num_paths))
    found = []
    for _ in range(2):
        one = copy.deepcopy(model)
        one(x, samples).square().sum().backward()
        found.append([p.grad for p in one.parameters()] + list(one.buffers()))
    for a, b in zip(*found):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_step_of_training_changes_what_naive_training_changes():
    """Parameters after Adam, over random paths per step."""
    options = [[o.double() for o in layer] for layer in mlp(5, 8, 8, 3, counts=(3, 3, 3))]
    model, generator = LayerEnsemble(options), torch.Generator().manual_seed(0)
    matched = pairs(options, model)
    mine = torch.optim.Adam(model.parameters(), lr=1e-2)
    theirs = torch.optim.Adam([p for layer in options for o in layer for p in o.parameters()], lr=1e-2)
    for _ in range(4):
        x, target = torch.randn(B, 5, **DOUBLE), torch.randn(B, 3, **DOUBLE)
        samples = model.sample(12, generator=generator)  # so that all options are in some path, mostly
        for run, optimizer in ((lambda x, s: model(x, s), mine), (lambda x, s: naive(options, x, s), theirs)):
            optimizer.zero_grad(set_to_none=False)
            (run(x, samples) - target).square().mean().backward()
            optimizer.step()
    for parameter, k, original in matched:
        close(parameter[k], original)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("case", ["batch-norm", "conv-batch-norm"])
def test_running_statistics(case, momentum):
    """As if each prefix had been run once by its option, in the order of the tree."""
    options, model, x = made(case)
    for module in (*model.layers.modules(), *[m for layer in options for o in layer for m in o.modules()]):
        norm = getattr(module, "_template", (module,))[0]
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = momentum
    samples = model.sample(7)
    for _ in range(2):
        model(x, samples)
    tree = model.tree(samples)
    for _ in range(2):
        before = [x]
        for layer, level in zip(options, tree.levels):
            before = [layer[k](before[p]) for p, k in zip(level.parent.tolist(), level.option.tolist())]
    for layer, stages in zip(options, model.layers):
        for stage in stages:
            if isinstance(getattr(stage, "template", None), nn.modules.batchnorm._BatchNorm):
                for k, option in enumerate(layer):
                    (norm,) = [m for m in option.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
                    close(stage.running_mean[k], norm.running_mean)
                    close(stage.running_var[k], norm.running_var)
                    assert stage.num_batches_tracked[k] == norm.num_batches_tracked


def test_values_that_are_no_numbers_stay_in_their_option():
    options = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double() for _ in range(3)]
    nn.init.constant_(options[1][0].weight, torch.nan)
    model = LayerEnsemble([options])
    model(torch.randn(B, 5, **DOUBLE), model.all_paths())
    for statistics in (model.layers[0][1].running_mean, model.layers[0][1].running_var):
        assert statistics.isnan().all(1).tolist() == [False, True, False]


class Overwriting(nn.Module):
    """Says nothing of what it does to its input."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first
        self.inner = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2) if self.first is None else self.first(x))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("first", [lambda: None, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(5))])
@pytest.mark.parametrize("trunk", [1, 2])
def test_prefixes_do_not_see_what_modules_overwrite(first, trunk, grad):
    options = [[nn.Linear(5, 5).double() for _ in range(trunk)], [Overwriting(first()).double() for _ in range(3)]]
    model, x = LayerEnsemble(options), torch.randn(B, 5, **DOUBLE)
    with torch.set_grad_enabled(grad):
        close(model(x, model.all_paths()), naive(options, x, model.all_paths()))
        alone, kept = LayerEnsemble(options[1:]), x.clone()
        close(alone(x, alone.all_paths()), naive(options[1:], x, alone.all_paths()))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", [nn.Softmax, nn.LogSoftmax, nn.Softmin])
def test_softmax_over_rows_is_that_of_each_path(kind):
    options = [[nn.Sequential(nn.Linear(5, 4), kind(0)).double() for _ in range(2)] for _ in range(1)]
    options.append([nn.Sequential(nn.Linear(4, 3), kind(dim=0)).double() for _ in range(3)])
    model, x = LayerEnsemble(options), torch.randn(B, 5, **DOUBLE)
    close(model(x, model.all_paths()), naive(options, x, model.all_paths()))


def test_images_stay_channels_last():
    model = LayerEnsemble(cnn()).to(memory_format=torch.channels_last).eval()
    x = torch.randn(3, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = model.layers[0]([x.unsqueeze(0)], model.tree(model.all_paths()).levels[0])
        assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert model.layers[0][0].weight.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("block", [1, 1000, 2**21])
@pytest.mark.parametrize("case", ["conv", "conv-last", "mixed"])
def test_blocks(case, block, monkeypatch):
    """Whatever part of a run is computed at a time."""
    monkeypatch.setattr(layer_file, "BLOCK_BYTES", block)
    options, model, x = made(case)
    for module in (model, *[m for layer in options for m in layer]):
        module.eval()
    expected = naive(options, x, model.all_paths())
    with torch.no_grad():
        for samples in sample_sets(model).values():
            close(model(x, samples), expected[numbers_of(samples, model.num_options)])


def test_dropout_draws_once_for_each_prefix():
    model = LayerEnsemble([[nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)) for _ in range(2)], [nn.Identity()] * 3])
    y = model(torch.ones(8, 4), model.all_paths())
    assert torch.equal(y[0], y[1])
    assert (y[0] == 0).any()
    assert not (model.eval()(torch.ones(8, 4), model.all_paths()) == 0).any()
