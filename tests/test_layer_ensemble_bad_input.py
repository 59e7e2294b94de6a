"""Bad input of LayerEnsemble: layers, paths and inputs that do not fit, by their names."""

from __future__ import annotations

import pytest
import torch
from layer_ensemble_cases import VECTOR, B, Residual, mlp, network
from torch import Tensor, nn

from effens_kernels.nn import LayerEnsemble


def linear(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o)


SHARED = nn.Linear(4, 4)
BAD_LAYERS = {
    "none": (lambda: LayerEnsemble([]), ValueError, "layers should be at least one"),
    "a_model": (
        lambda: LayerEnsemble(network()),
        TypeError,
        "a sequence of layers (or use from_model), got Sequential",
    ),
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
    "num_options_0": (lambda: LayerEnsemble.from_model(network(), 0), ValueError, "num_options should be at least 1"),
    "num_options_float": (lambda: LayerEnsemble.from_model(network(), 2.0), TypeError, "num_options should be an int"),
    "num_options_short": (lambda: LayerEnsemble.from_model(network(), [2, 3]), ValueError, "one for each of 3 layers"),
    "members_0": (lambda: LayerEnsemble.deep_ensemble(network(), 0), ValueError, "num_members should be at least 1"),
    "trunk": (
        lambda: LayerEnsemble.deep_sub_ensemble(network(), 2, trunk=4),
        ValueError,
        "trunk should be 0 to 3 layers",
    ),
    "trunk_float": (
        lambda: LayerEnsemble.deep_sub_ensemble(network(), 2, trunk=1.0),
        TypeError,
        "trunk should be an int",
    ),
    "no_models": (lambda: LayerEnsemble.from_models([]), ValueError, "models should be at least one"),
    "models_differ": (
        lambda: LayerEnsemble.from_models([network(), network()[:4]]),
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
