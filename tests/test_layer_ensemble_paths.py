"""LayerEnsemble computes each prefix once, frees what nobody needs any more, and draws and lists paths."""

from __future__ import annotations

import pytest
import torch
from layer_ensemble_cases import cnn, mlp, sample_sets
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effens_kernels import _dispatch, _native
from effens_kernels.nn import LayerEnsemble
from effens_kernels.nn.layer_ensemble import layer as layer_file
from effens_kernels.nn.layer_ensemble.layer import spans
from effens_kernels.nn.layer_ensemble.prefix_tree import PrefixTree
from examples.activation_memory import ActivationMemory


def numbers_of(samples: Tensor, num_options: tuple[int, ...]) -> Tensor:
    """Where paths are among all of them."""
    numbers = torch.zeros(len(samples), dtype=torch.long)
    for options, count in zip(samples.unbind(1), num_options):
        numbers = numbers * count + options
    return numbers


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
