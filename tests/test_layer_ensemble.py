"""LayerEnsemble equals its paths run one by one, computes each prefix once, and frees what nobody needs any more."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_ensemble_cases import CASES, VECTOR, B, Residual, cnn, made, mlp, naive, pairs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effens_kernels import _dispatch, _native
from effens_kernels.nn import LayerEnsemble
from effens_kernels.nn.layer_ensemble import layer as layer_file
from effens_kernels.nn.layer_ensemble.layer import spans
from effens_kernels.nn.layer_ensemble.prefix_tree import PrefixTree
from examples.activation_memory import ActivationMemory

DOUBLE = {"dtype": torch.float64}
cases = pytest.mark.parametrize("case", CASES)


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


def numbers_of(samples: Tensor, num_options: tuple[int, ...]) -> Tensor:
    """Where paths are among all of them."""
    numbers = torch.zeros(len(samples), dtype=torch.long)
    for options, count in zip(samples.unbind(1), num_options):
        numbers = numbers * count + options
    return numbers


# ----------------------------------------------------------------------------------------------------------- values


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


# --------------------------------------------------------------------------------------------- each prefix once, freed


def test_prefixes_by_hand():
    """The paper's figure 1c: two networks that share their first two layers."""
    tree = PrefixTree(torch.tensor([[0, 1, 2], [0, 1, 0], [2, 1, 0], [0, 1, 2]]), (3, 3, 3))
    assert tree.num_prefixes == (2, 2, 3)
    assert tree.inverse is not None
    assert PrefixTree(torch.tensor([[0, 1, 2], [0, 1, 0]]), (3, 3, 3)).num_prefixes == (1, 1, 2)
    assert PrefixTree(torch.tensor([[0, 1, 2], [0, 1, 0]]), (3, 3, 3)).inverse is None


@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 4, 2), (2, 3, 1)])
@pytest.mark.parametrize("unique", [True, False])
def test_tree_follows_every_path(counts, unique):
    model = LayerEnsemble(mlp(5, 4, 4, 3, counts=counts))
    samples = model.sample(model.num_paths if unique else 3 * model.num_paths, unique)
    tree = model.tree(samples)
    node = torch.arange(len(samples)) if tree.inverse is None else tree.inverse
    for q in range(2, -1, -1):
        level = tree.levels[q]
        assert torch.equal(level.option[node], samples[:, q])
        node = level.parent[node]
        prefixes = torch.unique(samples[:, : q + 1], dim=0)
        assert level.size == len(prefixes)
    assert not node.any()


def test_each_prefix_is_computed_once():
    """FLOPs of convolutions and products, counted by PyTorch."""
    model = LayerEnsemble(cnn(counts=(3, 3, 3, 3))).eval()
    x, paths = torch.randn(4, 2, 8, 8), model.all_paths()

    def flops(run) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    of_convolutions = [flops(lambda q=q: model.path([0, 0, 0, 0])[: q + 1](x)) for q in range(2)]
    first, second = of_convolutions[0], of_convolutions[1] - of_convolutions[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, paths)
    found = counter.get_flop_counts()["Global"]
    assert found[torch.ops.aten.convolution] == 3 * first + 9 * second


needs_kernel = pytest.mark.skipif(
    not _native.available or "cpu" not in _dispatch.IMPLEMENTED.get("indexed_linear", {}),
    reason="indexed_linear's reference gathers its operands",
)


def two_widest(sizes: list[int]) -> int:
    return max(a + b for a, b in zip(sizes, sizes[1:]))


@needs_kernel
@pytest.mark.parametrize("kind", ["all", "some", "repeated"])
def test_peak_memory_of_linear_layers(kind):
    """What is alive at once without gradients: never more than two layers that follow each other."""
    widths = (16, 64, 32, 64, 10)
    model = LayerEnsemble(mlp(*widths, counts=(4, 4, 4, 4))).eval()
    samples, x = sample_sets(model)[kind], torch.randn(8, 16)
    tree = model.tree(samples)
    sizes = [8 * 4 * n * width for n, width in zip(tree.num_prefixes, widths[1:])]
    if tree.inverse is not None:  # the result in the order of the caller, with repetitions
        sizes.append(8 * 4 * len(samples) * widths[-1])
    with torch.no_grad(), ActivationMemory() as memory:
        model(x, tree)
    assert memory.peak <= two_widest(sizes)


@needs_kernel
def test_peak_memory_of_norms():
    """What a layer was given is freed as soon as its first module has run, not with the last."""
    widths, rows = (16, 64, 64, 10), 8
    model = LayerEnsemble(mlp(*widths, counts=(4, 3, 1), norm=nn.LayerNorm, act=nn.ELU)).eval()
    x, samples = torch.randn(rows, 16), model.all_paths()
    last = 12 * rows * 64 * 4  # the second layer's, which three modules make
    norm = 2 * 12 * (rows + 64) * 4  # mean and deviation of each row, weight and bias of each prefix
    with torch.no_grad(), ActivationMemory() as memory:
        model(x, model.tree(samples))
    assert memory.peak <= 2 * last + norm + 512  # and indices


def images(kind: str) -> tuple[LayerEnsemble, Tensor, PrefixTree]:
    model = LayerEnsemble(cnn(counts=(5, 5, 5, 5))).eval()
    return model, torch.randn(32, 2, 8, 8), model.tree(sample_sets(model)[kind])


@needs_kernel
@pytest.mark.parametrize("kind", ["all", "some"])
def test_peak_memory_of_convolutions(kind, monkeypatch):
    monkeypatch.setattr(layer_file, "BLOCK_BYTES", 2**14)
    model, x, tree = images(kind)
    sizes = [32 * 4 * n * width for n, width in zip(tree.num_prefixes, (4 * 16, 6 * 16, 5, 3))]
    with torch.no_grad(), ActivationMemory() as memory:
        model(x, tree)
    assert memory.peak <= two_widest(sizes) + 2**14  # what a block needs between its stages


def test_memory_counter():
    """The counter itself: views share memory, freed memory is given back."""
    x = torch.randn(1000)
    with ActivationMemory() as memory:
        a = x * 2
        b = a.view(10, 100)
        del a
        assert memory.alive == 4000
        c = b + 1
        assert memory.alive == memory.peak == 8000
        del b
        assert memory.alive == 4000
        c.add_(1)
        assert (memory.alive, memory.peak) == (4000, 8000)


# ------------------------------------------------------------------------------------------------------------- paths


def test_samples_are_drawn_without_listing_all_paths():
    """10^12 paths."""
    model = LayerEnsemble([[nn.Identity() for _ in range(10)]] * 12)
    assert model.num_paths == 10**12
    samples = model.sample(5000)
    assert samples.shape == (5000, 12)
    assert len(torch.unique(samples, dim=0)) == 5000
    assert ((samples >= 0) & (samples < 10)).all()
    for counts in samples.t():
        assert (counts.bincount(minlength=10) > 350).all()  # 500 expected, standard deviation 21
    assert torch.equal(model.all_paths(10**12 - 2), torch.tensor([[9] * 11 + [8], [9] * 12]))


def test_more_paths_than_an_integer_counts():
    model = LayerEnsemble([[nn.Identity() for _ in range(10)]] * 30)
    assert model.num_paths == 10**30
    samples = model.sample(100)
    assert len(torch.unique(samples, dim=0)) == 100
    with pytest.raises(ValueError, match="below 2"):
        model.all_paths(10**30 - 2)


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12])
def test_unique_samples_are_fair(count):
    """Every path is equally likely at every place."""
    model = LayerEnsemble(mlp(5, 4, 3, counts=(3, 4)))
    generator = torch.Generator().manual_seed(count)
    draws = torch.stack([numbers_of(model.sample(count, generator=generator), (3, 4)) for _ in range(1200)])
    for place in (0, count - 1):
        seen = draws[:, place].bincount(minlength=12)  # 100 expected, standard deviation 9.6
        assert (seen > 50).all()
        assert (seen < 150).all()
    assert all(len(set(row.tolist())) == count for row in draws)


def test_samples_repeat_from_one_seed():
    model = LayerEnsemble(mlp(5, 4, 3, counts=(30, 40)))
    first, second = (model.sample(9, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(torch.unique(model.sample(200, unique=False), dim=0)) < 200


def test_all_paths():
    model = LayerEnsemble(mlp(5, 4, 3, counts=(2, 3)))
    assert model.all_paths().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert model.all_paths(2, 4).tolist() == [[0, 2], [1, 0]]


def test_trees_are_remembered():
    model = LayerEnsemble(mlp(5, 4, 3, counts=(3, 4)))
    samples = model.sample(6)
    tree = model.tree(samples)
    assert model.tree(samples.clone()) is tree
    assert model.tree(samples.int()) is tree
    samples[0, 0] = (samples[0, 0] + 1) % 3  # the same tensor with another value
    assert model.tree(samples) is not tree
    for _ in range(20):
        model.tree(model.sample(6))
    assert len(model._trees._known) <= 8


# --------------------------------------------------------------------------------------------- constructors and priors

PLAIN = lambda: nn.Sequential(  # noqa: E731
    nn.Flatten(),
    nn.Linear(6, 8),
    nn.BatchNorm1d(8),
    nn.ReLU(),
    nn.Linear(8, 7),
    nn.Tanh(),
    nn.Dropout(0.1),
    nn.Linear(7, 3),
)


def test_from_model():
    plain = PLAIN().double()
    before = copy.deepcopy(plain.state_dict())
    model = LayerEnsemble.from_model(plain, num_options=[2, 3, 4])
    assert model.num_options == (2, 3, 4)
    assert model.path([0, 1, 2])(torch.randn(B, 2, 3, **DOUBLE)).shape == (B, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), before.values()))
    values = [p[k] for p in model.parameters() if p.dim() == 3 for k in range(len(p))]
    assert all(not torch.equal(a, b) for n, a in enumerate(values) for b in values[:n] if a.shape == b.shape)
    bounds = [p.abs().max() * p.shape[2] ** 0.5 for p in model.parameters() if p.dim() == 3]
    assert all(0.5 < bound <= 1 for bound in bounds)  # as torch.nn.Linear draws them


def test_from_models_keeps_the_weights():
    models = [PLAIN().double().eval() for _ in range(3)]
    ensemble = LayerEnsemble.from_models(models)
    x = torch.randn(B, 2, 3, **DOUBLE)
    assert not ensemble.training
    close(ensemble(x), torch.stack([m(x) for m in models]))
    assert ensemble.num_paths == 27


def test_deep_ensemble():
    model = LayerEnsemble.deep_ensemble(PLAIN(), num_members=4)
    assert model.samples.tolist() == [[k] * 3 for k in range(4)]
    x = torch.randn(B, 6)
    model.eval()
    torch.testing.assert_close(model(x), torch.stack([model.path([k] * 3)(x) for k in range(4)]))
    assert model.tree(model.samples).num_prefixes == (4, 4, 4)


@pytest.mark.parametrize("trunk", [0, 1, 2, 3])
def test_deep_sub_ensemble_runs_its_trunk_once(trunk):
    model = LayerEnsemble.deep_sub_ensemble(PLAIN(), num_members=4, trunk=trunk).eval()
    assert model.num_options == (1,) * trunk + (4,) * (3 - trunk)
    x, members = torch.randn(B, 6), 4 if trunk < 3 else 1
    assert model(x).shape == (members, B, 3)
    assert model.tree(model.samples).num_prefixes == model.num_options
    torch.testing.assert_close(model(x), torch.stack([model.path(path)(x) for path in model.samples]))


def test_prior():
    """The twin's output on the same path, scaled; not trained, saved, and fixed also while training."""
    model = LayerEnsemble.from_model(PLAIN().double(), num_options=3, prior_scale=0.7)
    x, samples = torch.randn(B, 6, **DOUBLE), model.sample(9)
    assert not any(name.startswith("prior") for name, _ in model.named_parameters())
    state = model.state_dict()
    assert {name for name in state if name.startswith("prior.")} == {
        f"prior.{name}" for name in state if not name.startswith("prior.")
    }
    before = {name: value.clone() for name, value in state.items() if name.startswith("prior.")}
    model.train()
    assert not model.prior.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, samples).square().mean().backward()
    optimizer.step()
    model.requires_grad_(True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    for grad in (False, True):
        model.eval()
        with torch.set_grad_enabled(grad):
            twin = torch.stack([model.prior.path(path)(x) for path in samples])
            trained = torch.stack([model.path(path)(x) for path in samples])
            assert not torch.allclose(twin, trained)
            close(model(x, samples), trained + 0.7 * twin)
    other = LayerEnsemble.from_model(PLAIN().double(), num_options=3, prior_scale=0.7).eval()
    other.load_state_dict(model.state_dict())
    close(other(x, samples), model(x, samples))


def test_gradients_go_through_the_prior():
    model = LayerEnsemble.from_model(PLAIN().double(), num_options=2, prior_scale=2.0).eval()
    x = torch.randn(B, 6, **DOUBLE, requires_grad=True)
    samples = model.sample(3)
    (mine,) = torch.autograd.grad(model(x, samples).sum(), x)
    y = sum(model.path(p)(x).sum() + 2 * model.prior.path(p)(x).sum() for p in samples)
    close(mine, torch.autograd.grad(y, x)[0])


# ---------------------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("case", ["conv-batch-norm", "mixed", "layer-norm"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies(case, how):
    options, model, x = made(case)
    model.samples = model.sample(3)
    model(x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = LayerEnsemble([[copy.deepcopy(o) for o in layer] for layer in options])
        other.load_state_dict(torch.load(file))
        other.samples = model.samples
    assert torch.equal(other.eval()(x), model.eval()(x))
    other_parameter = next(other.parameters())
    other_parameter.data.zero_()
    assert next(model.parameters()).any()


def test_moves_and_casts():
    model = LayerEnsemble(cnn(norm=nn.BatchNorm2d)).bfloat16().eval()
    x = torch.randn(B, 2, 8, 8)
    samples = model.sample(5)
    y = model(x.bfloat16(), samples)
    assert y.dtype is torch.bfloat16
    expected = torch.stack([model.path(path).float()(x.bfloat16().float()) for path in samples])
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    assert model.path(samples[0])[0][0].weight.dtype is torch.bfloat16


def test_autocast():
    model, x = LayerEnsemble(cnn()).eval(), torch.randn(B, 2, 8, 8)
    samples = model.sample(5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = model(x, samples)
    assert y.dtype is torch.bfloat16
    expected = model(x, samples)
    assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("case", ["linear", "conv-batch-norm"])
def test_trains_after_inference_mode(case):
    """On the same paths, whose tree is remembered."""
    _, model, x = made(case)
    samples = model.sample(5, unique=False)
    with torch.inference_mode():
        model(x, samples)
    model(x, samples).sum().backward()


def test_modules_keep_their_modes():
    plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Dropout(0.9))
    plain[1].eval()
    for model in (
        LayerEnsemble.from_models([plain, copy.deepcopy(plain)]),
        LayerEnsemble.from_model(plain, 2, prior_scale=1.0),
    ):
        assert [stage.training for layer in model.layers for stage in layer] == [True, False, True, True]
        assert model.training
        assert not any(module.training for module in ([] if model.prior is None else model.prior.modules()))
    assert [module.training for module in plain] == [True, False, True, True]
    path = model.eval().path([0, 1])
    assert not any(module.training for module in path.modules())
    assert not LayerEnsemble.from_models([path]).training


def test_frozen_options_stay_frozen():
    options = mlp(5, 4, 3, counts=(3, 2))
    options[0][1].requires_grad_(False)
    model = LayerEnsemble(options)
    assert [p.requires_grad for p in model.layers[0].parameters()] == [True, True, False, False, True, True]
    assert not LayerEnsemble([[options[0][1]]]).layers[0][0].weight.requires_grad


def test_hooks_run():
    options = mlp(5, 4, 3, counts=(2, 2))
    seen = []
    options[0][1][0].register_forward_hook(lambda *_: seen.append(1))
    model = LayerEnsemble(options)
    model(torch.randn(B, 5), model.all_paths())
    assert seen


def test_options_are_copied():
    options = mlp(5, 4, 3, counts=(2, 2))
    model = LayerEnsemble(options)
    options[0][0][0].weight.data.zero_()
    assert all(p.any() for p in model.parameters())


@pytest.mark.parametrize("case", ["GELU", "conv-batch-norm"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiles(case, grad):
    """With a tree in place of samples the graph is whole; with samples it breaks where their values are read."""
    _, model, x = made(case)
    model.eval()
    samples = model.sample(5)
    with torch.set_grad_enabled(grad):
        expected = model(x, samples)
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, model.tree(samples)), expected)
        if case == "GELU":
            close(torch.compile(model, backend="aot_eager")(x, samples), expected)


# ----------------------------------------------------------------------------------------------------------- bad input


def linear(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o)


SHARED = nn.Linear(4, 4)
BAD_LAYERS = {
    "none": (lambda: LayerEnsemble([]), ValueError, "layers should be at least one"),
    "a_model": (lambda: LayerEnsemble(PLAIN()), TypeError, "a sequence of layers (or use from_model), got Sequential"),
    "no_options": (lambda: LayerEnsemble([[linear(4, 4)], []]), ValueError, "layer 1 should be at least one option"),
    "no_module": (
        lambda: LayerEnsemble([[linear(4, 4), 3]]),
        TypeError,
        "layer 0, option 1 should be a torch.nn.Module",
    ),
    "a_number": (lambda: LayerEnsemble([4]), TypeError, "layer 0, option 0 should be a torch.nn.Module, got int"),
    "chain": (
        lambda: LayerEnsemble([[linear(4, 5)], [linear(5, 6), linear(6, 6)]]),
        ValueError,
        "layer 1, option 1 should be a layer of 5 input features, as layer 0 gives, got one of 6",
    ),
    "chain_through": (
        lambda: LayerEnsemble([nn.Sequential(linear(4, 5), nn.ReLU(), nn.LayerNorm(5)), [linear(4, 6)]]),
        ValueError,
        "layer 1, option 0 should be a layer of 5 input features",
    ),
    "channels": (
        lambda: LayerEnsemble([[nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2))], [nn.Conv2d(4, 3, 3)]]),
        ValueError,
        "layer 1, option 0 should be a layer of 3 input channels, as layer 0 gives, got one of 4",
    ),
    "inputs_differ": (
        lambda: LayerEnsemble([[linear(4, 5), linear(3, 5)]]),
        ValueError,
        "layer 0, option 1 should be a layer of 4 input features, as option 0, got one of 3 features",
    ),
    "outputs_differ": (
        lambda: LayerEnsemble([[linear(4, 5), linear(4, 6)]]),
        ValueError,
        "layer 0, option 1 should be a layer of 5 output features, as option 0, got one of 6",
    ),
    "tied": (
        lambda: LayerEnsemble([[SHARED], [SHARED]]),
        ValueError,
        "layer 1, option 0 should be of parameters of its own, since options are copied, got one of layer 0, option 0",
    ),
    "prior_scale": (lambda: LayerEnsemble([linear(4, 4)], prior_scale="1"), TypeError, "prior_scale should be None or"),
    "prior_unknown": (
        lambda: LayerEnsemble([[nn.MultiheadAttention(4, 1)]], prior_scale=1.0),
        ValueError,
        "of modules that have reset_parameters(), got MultiheadAttention",
    ),
    "from_no_sequential": (lambda: LayerEnsemble.from_model(linear(4, 4), 2), TypeError, "a torch.nn.Sequential"),
    "from_nothing": (lambda: LayerEnsemble.from_model(nn.Sequential(nn.ReLU()), 2), ValueError, "at least one module"),
    "num_options_0": (lambda: LayerEnsemble.from_model(PLAIN(), 0), ValueError, "num_options should be at least 1"),
    "num_options_float": (lambda: LayerEnsemble.from_model(PLAIN(), 2.0), TypeError, "num_options should be an int"),
    "num_options_short": (lambda: LayerEnsemble.from_model(PLAIN(), [2, 3]), ValueError, "one for each of 3 layers"),
    "members_0": (lambda: LayerEnsemble.deep_ensemble(PLAIN(), 0), ValueError, "num_members should be at least 1"),
    "trunk": (
        lambda: LayerEnsemble.deep_sub_ensemble(PLAIN(), 2, trunk=4),
        ValueError,
        "trunk should be 0 to 3 layers",
    ),
    "trunk_float": (
        lambda: LayerEnsemble.deep_sub_ensemble(PLAIN(), 2, trunk=1.0),
        TypeError,
        "trunk should be an int",
    ),
    "no_models": (lambda: LayerEnsemble.from_models([]), ValueError, "models should be at least one"),
    "models_differ": (
        lambda: LayerEnsemble.from_models([PLAIN(), PLAIN()[:4]]),
        ValueError,
        "models should be of one number of layers, got 3 and 1",
    ),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layers(name):
    make, error, words = BAD_LAYERS[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)
    assert str(raised.value).startswith("LayerEnsemble")


def three_by_four() -> LayerEnsemble:
    return LayerEnsemble(mlp(5, 4, 3, counts=(3, 4)))


def run(model: LayerEnsemble, *arguments: object) -> Tensor:
    return model(torch.randn(B, *VECTOR), *arguments)


BAD_CALLS = {
    "out_of_range": (
        lambda m: run(m, torch.tensor([[0, 0], [1, 4], [3, 0]])),
        ValueError,
        "samples should be options 0 to 3 (K=4) in layer 1, got 4 in path 1",
    ),
    "negative": (
        lambda m: run(m, torch.tensor([[0, 0], [-1, 0]])),
        ValueError,
        "samples should be options 0 to 2 (K=3) in layer 0, got -1 in path 1",
    ),
    "empty": (
        lambda m: run(m, torch.zeros(0, 2).long()),
        ValueError,
        "samples should be [S, N=2] of at least one path",
    ),
    "layers": (lambda m: run(m, torch.zeros(3, 3).long()), ValueError, "samples should be [S, N=2]"),
    "one_axis": (lambda m: run(m, torch.zeros(2).long()), ValueError, "samples should be [S, N=2]"),
    "float": (lambda m: run(m, torch.zeros(3, 2)), TypeError, "samples should be a tensor of integers, got float32"),
    "bool": (lambda m: run(m, torch.zeros(3, 2).bool()), TypeError, "samples should be a tensor of integers, got bool"),
    "list": (lambda m: run(m, [[0, 0]]), TypeError, "samples should be a tensor of integers, got list"),
    "none": (run, ValueError, "samples should be given, or set as its attribute, got None"),
    "of_another": (
        lambda m: run(m, LayerEnsemble(mlp(5, 4, 3, counts=(3, 5))).tree(torch.zeros(1, 2).long())),
        ValueError,
        "samples should be a tree of (3, 4) options, got one of (3, 5)",
    ),
    "set": (lambda m: setattr(m, "samples", torch.tensor([[3, 0]])), ValueError, "options 0 to 2 (K=3) in layer 0"),
    "path": (lambda m: m.path([0, 4]), ValueError, "options 0 to 3 (K=4) in layer 1"),
    "input_list": (lambda m: m([1.0], m.sample(2)), TypeError, "input should be a torch.Tensor"),
    "input_axes": (lambda m: m(torch.randn(5), m.sample(2)), ValueError, "input should be [B, ...]"),
    "input_features": (lambda m: m(torch.randn(B, 6), m.sample(2)), ValueError, "[..., I=5] where it reaches Linear"),
    "count_0": (lambda m: m.sample(0), ValueError, "count should be at least 1"),
    "count_float": (lambda m: m.sample(2.0), TypeError, "count should be an int"),
    "too_many": (lambda m: m.sample(13), ValueError, "count should be at most the 12 paths there are with unique=True"),
    "range": (lambda m: m.all_paths(5, 14), ValueError, "0 <= start < stop <= 12"),
    "diagonal": (
        lambda m: m.diagonal_paths(),
        ValueError,
        "of 1 or K=4 options in each layer for diagonal paths, got 3",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, words = BAD_CALLS[name]
    with pytest.raises(error) as raised:
        call(three_by_four())
    assert words in str(raised.value)


@pytest.mark.parametrize("grad", [False, True])
def test_options_of_different_results(grad):
    """Sizes that modules do not tell show when they run."""
    model = LayerEnsemble([[nn.Sequential(nn.Flatten(), Residual(5)), nn.Sequential(nn.AdaptiveAvgPool1d(4))]])
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"LayerEnsemble: .*result"):
        run(model, model.all_paths())


def test_members_of_a_deep_ensemble_of_convolutions_run_one_by_one_from_end_to_end():
    plain = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(3)))
    model = LayerEnsemble.from_model(plain, 3).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    counts = {}
    for name, samples in {
        "diagonal": [[0, 0, 0], [1, 1, 1], [2, 2, 2]],
        "any order": [[2, 2, 2], [0, 0, 0], [1, 1, 1]],
        "crossed": [[0, 1, 0], [1, 0, 1], [2, 2, 2]],
        "shared": [[0, 0, 0], [0, 1, 1], [2, 2, 2]],
    }.items():
        samples = torch.tensor(samples)
        levels = model.tree(samples).levels
        counts[name] = [1 + len(onward) for _, _, onward in spans(model.layers, levels)]
        with torch.no_grad():
            expected = torch.stack([model.path(path)(x) for path in samples])
            torch.testing.assert_close(model(x, samples), expected)
    assert counts == {"diagonal": [3], "any order": [2, 1], "crossed": [1, 1, 1], "shared": [1, 2]}
