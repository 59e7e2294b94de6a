"""LayerEnsemble's constructors and priors, and it as a module: copies, modes, hooks, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_ensemble_cases import DOUBLE, B, close, cnn, made, mlp, network
from torch import nn

from effens_kernels.nn import LayerEnsemble


def test_from_model():
    plain = network().double()
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
    models = [network().double().eval() for _ in range(3)]
    ensemble = LayerEnsemble.from_models(models)
    x = torch.randn(B, 2, 3, **DOUBLE)
    assert not ensemble.training
    close(ensemble(x), torch.stack([m(x) for m in models]))
    assert ensemble.num_paths == 27


def test_deep_ensemble():
    model = LayerEnsemble.deep_ensemble(network(), num_members=4)
    assert model.samples.tolist() == [[k] * 3 for k in range(4)]
    x = torch.randn(B, 6)
    model.eval()
    torch.testing.assert_close(model(x), torch.stack([model.path([k] * 3)(x) for k in range(4)]))
    assert model.tree(model.samples).num_prefixes == (4, 4, 4)


@pytest.mark.parametrize("trunk", [0, 1, 2, 3])
def test_deep_sub_ensemble_runs_its_trunk_once(trunk):
    model = LayerEnsemble.deep_sub_ensemble(network(), num_members=4, trunk=trunk).eval()
    assert model.num_options == (1,) * trunk + (4,) * (3 - trunk)
    x, members = torch.randn(B, 6), 4 if trunk < 3 else 1
    assert model(x).shape == (members, B, 3)
    assert model.tree(model.samples).num_prefixes == model.num_options
    torch.testing.assert_close(model(x), torch.stack([model.path(path)(x) for path in model.samples]))


def test_prior():
    """The twin's output on the same path, scaled; not trained, saved, and fixed also while training."""
    model = LayerEnsemble.from_model(network().double(), num_options=3, prior_scale=0.7)
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
    other = LayerEnsemble.from_model(network().double(), num_options=3, prior_scale=0.7).eval()
    other.load_state_dict(model.state_dict())
    close(other(x, samples), model(x, samples))


def test_gradients_go_through_the_prior():
    model = LayerEnsemble.from_model(network().double(), num_options=2, prior_scale=2.0).eval()
    x = torch.randn(B, 6, **DOUBLE, requires_grad=True)
    samples = model.sample(3)
    (mine,) = torch.autograd.grad(model(x, samples).sum(), x)
    y = sum(model.path(p)(x).sum() + 2 * model.prior.path(p)(x).sum() for p in samples)
    close(mine, torch.autograd.grad(y, x)[0])


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
