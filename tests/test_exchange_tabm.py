"""Layers and models of tabm compute the same here, and their states pass both ways with the same bits.

Each test runs with tabm itself, where it is installed, and with its formulas.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from exchange_cases import Tabm, assert_same, assert_same_bits, gradients, tabm_package
from torch import nn

import effens_kernels as ek
from effens_kernels.exchange import tabm as exchange
from effens_kernels.testing import assert_accurate

E, I, O = 4, 7, 5
LAYERS = {
    "LinearBatchEnsemble": lambda lib, **o: lib.LinearBatchEnsemble(I, O, k=E, scaling_init="normal", **o),
    "LinearBatchEnsemble-nobias": lambda lib, **o: lib.LinearBatchEnsemble(
        I, O, False, k=E, scaling_init="normal", **o
    ),
    "LinearEnsemble": lambda lib, **o: lib.LinearEnsemble(I, O, k=E, **o),
    "LinearEnsemble-nobias": lambda lib, **o: lib.LinearEnsemble(I, O, False, k=E, **o),
    "BatchNorm1dEnsemble": lambda lib, **o: lib.BatchNorm1dEnsemble(I, k=E, eps=1e-3, momentum=0.3, **o),
    "BatchNorm1dEnsemble-plain": lambda lib, **o: lib.BatchNorm1dEnsemble(I, k=E, affine=False, **o),
    "BatchNorm1dEnsemble-batch": lambda lib, **o: lib.BatchNorm1dEnsemble(I, k=E, track_running_stats=False, **o),
    "LayerNormEnsemble": lambda lib, **o: lib.LayerNormEnsemble(I, k=E, eps=1e-3, **o),
    "LayerNormEnsemble-plain": lambda lib, **o: lib.LayerNormEnsemble(I, k=E, elementwise_affine=False, **o),
}
LINEAR = [name for name in LAYERS if name.startswith("Linear")]
ARCHITECTURES = "tabm", "tabm-mini", "tabm-packed"
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(params=["tabm", "formulas"])
def lib(request):
    return tabm_package() if request.param == "tabm" else Tabm


def randomized(module: nn.Module) -> nn.Module:
    """No parameter or statistic of ones or zeros, which hide what they multiply."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.randn_like(value) / 3)
                if name.endswith("running_var"):
                    value.abs_().add_(0.1)
            else:
                value.add_(3)
    return module


def layer_of(lib, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomized(LAYERS[name](lib, dtype=dtype))


def model_of(lib, architecture: str, *, d_out: int | None = 3, **options) -> nn.Module:
    start = None if architecture == "tabm-packed" else "normal"
    sizes = {"n_num_features": I, "d_out": d_out, "n_blocks": 3, "d_block": 9, "k": E, "dropout": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomized(lib.TabM(**sizes, arch_type=architecture, start_scaling_init=start, **options))


def rows(*batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*batch, E, I, dtype=dtype)


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_computes_the_same(lib, name, dtype):
    theirs = layer_of(lib, name, dtype)
    ours = exchange.from_layer(theirs)
    assert type(ours).__module__.startswith("effens_kernels.nn.")
    assert_same(ours, theirs, rows(17, dtype=dtype), state_of=exchange.state_dict)
    theirs.eval()
    assert_same(ours.eval(), theirs, rows(3, dtype=dtype).mT.contiguous().mT, state_of=exchange.state_dict)


@pytest.mark.parametrize("name", LAYERS)
def test_state_of_a_layer_passes_both_ways(lib, name):
    theirs = layer_of(lib, name)
    ours, fresh = exchange.from_layer(theirs), exchange.from_layer(layer_of(lib, name))
    assert_same_bits(exchange.state_dict(ours), theirs.state_dict())
    assert exchange.load_state_dict(fresh, theirs.state_dict()) is fresh
    assert_same_bits(fresh.state_dict(), ours.state_dict())
    theirs_again = layer_of(lib, name)
    theirs_again.load_state_dict(exchange.state_dict(fresh))
    assert_same_bits(theirs_again.state_dict(), theirs.state_dict())


def test_layer_is_a_copy_that_keeps_mode_and_what_is_trained(lib):
    theirs = layer_of(lib, "LinearBatchEnsemble").eval()
    theirs.weight.requires_grad_(False)
    rng = torch.get_rng_state()
    ours = exchange.from_layer(theirs)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not ours.training
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in theirs.named_parameters()
    }
    before = ours.r.clone()
    with torch.no_grad():
        theirs.r.zero_()
    assert torch.equal(ours.r, before)


def test_batch_norm_updates_its_statistics_alike(lib):
    theirs = layer_of(lib, "BatchNorm1dEnsemble", torch.float64)
    ours, x = exchange.from_layer(theirs), rows(17, dtype=torch.float64)
    ours(x), theirs(x)
    state = exchange.state_dict(ours)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def test_batch_norm_of_members_that_saw_different_batches_has_no_state_there():
    norm = ek.nn.EnsembleBatchNorm1d(I, E)
    norm(torch.randn(3, I), member=1)
    with pytest.raises(ValueError, match=r"num_batches_tracked \[0, 1, 0, 0\]"):
        exchange.state_dict(norm)
    state = Tabm.BatchNorm1dEnsemble(I, k=E).state_dict()
    assert_same_bits(exchange.state_dict(exchange.load_state_dict(norm, state)), state)


def test_model_of_layers_built_alike_loads_what_theirs_saved(lib):
    theirs = nn.Sequential(layer_of(lib, "LinearEnsemble"), nn.Linear(O, I), layer_of(lib, "BatchNorm1dEnsemble"))
    ours = nn.Sequential(
        ek.nn.EnsembleLinear(I, O, E, batch_first=True),
        nn.Linear(O, I),
        ek.nn.EnsembleBatchNorm1d(I, E, eps=1e-3, momentum=0.3, batch_first=True),
    )
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    exchange.load_state_dict(ours, torch.load(file))
    # With statistics of the batch, the gradient of what a constant shifts before the norm would be zero.
    assert_same(ours.eval(), theirs.eval(), rows(17), state_of=exchange.state_dict)
    assert_same_bits(exchange.state_dict(ours), theirs.state_dict())


# ------------------------------------------------------------------------------------------- whole models


@architectures
@pytest.mark.parametrize(
    "x", [rows(17)[:, 0], rows(17), rows(0), rows(34)[::2]], ids=["shared", "own", "empty", "step"]
)
def test_model_of_a_state_computes_the_same(lib, architecture, x):
    x = torch.randn_like(x)
    theirs = model_of(lib, architecture)
    ours = exchange.from_state(theirs.state_dict(), dropout=0.0)
    if not len(x):
        assert ours(x).shape == theirs(x).shape
        return
    assert_same(ours, theirs, x, state_of=exchange.state_dict)


@architectures
@pytest.mark.parametrize("d_out", [None, 3])
def test_state_of_a_model_passes_both_ways(lib, architecture, d_out):
    theirs = model_of(lib, architecture, d_out=d_out).double()
    ours = exchange.from_state(theirs.state_dict())
    assert_same_bits(exchange.state_dict(ours), theirs.state_dict())
    assert ours(rows(3, dtype=torch.float64)).shape == (3, E, 3 if d_out else 9)


@pytest.mark.parametrize("activation", ["GELU", "SiLU", "Tanh"])
@architectures
def test_model_of_a_state_with_another_activation(architecture, activation):
    theirs = model_of(tabm_package(), architecture, activation=activation)
    ours = exchange.from_state(theirs.state_dict(), activation=activation.lower(), dropout=0.0)
    assert_same(ours, theirs, rows(17), state_of=exchange.state_dict)


@architectures
def test_accelerated_model_computes_the_same(lib, architecture):
    theirs = model_of(lib, architecture)
    ours = exchange.accelerate(copy.deepcopy(theirs))
    assert_same(ours, theirs, torch.randn(17, I), state_of=nn.Module.state_dict)
    assert_same(ours, theirs, rows(17), state_of=nn.Module.state_dict)
    assert ours(rows(0)).shape == (0, E, 3)


@pytest.mark.parametrize("activation", ["ReLU", "GELU", "SiLU", "Tanh", "LeakyReLU"])
def test_accelerated_model_with_embeddings_and_categories(activation):
    from rtdl_num_embeddings import PeriodicEmbeddings

    embeddings = PeriodicEmbeddings(I, 6, lite=False)
    theirs = model_of(
        tabm_package(), "tabm", cat_cardinalities=[2, 5], num_embeddings=embeddings, activation=activation
    )
    ours = exchange.accelerate(copy.deepcopy(theirs))
    classes = {type(m).__module__.split(".")[0] for m in ours.modules() if type(m).__name__ in exchange._ACCELERATED}
    assert classes == {"effens_kernels"}
    assert [type(m).__name__ for m in ours.modules() if type(m).__name__ == "LinearEnsemble"] == 2 * ["LinearEnsemble"]
    x, categories = torch.randn(17, I), torch.stack([torch.randint(2, (17,)), torch.randint(5, (17,))], 1)
    weights = torch.randn(17, E, 3)
    fixed = [lambda x, m=m, c=categories: m(x, c) for m in (ours, theirs)]
    results = []
    for model, call in zip((ours, theirs), fixed):
        y = call(x)
        results.append({"y": y, **dict(zip(theirs.state_dict(), torch.autograd.grad(y, model.parameters(), weights)))})
    exact = copy.deepcopy(theirs).double()
    y = exact(x.double(), categories)
    wide = [y, *torch.autograd.grad(y, exact.parameters(), weights.double())]
    for (name, actual), composed, value in zip(results[0].items(), results[1].values(), wide):
        assert_accurate(actual, value, composed, name, terms=composed.numel())


def test_accelerated_model_keeps_its_parameters_optimizer_and_hooks(lib):
    theirs = model_of(lib, "tabm")
    ours, reference = copy.deepcopy(theirs), theirs
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    identities, names = [id(p) for p in ours.parameters()], list(ours.state_dict())
    calls: list[torch.Size] = []
    ours.backbone.blocks[0][0].register_forward_hook(lambda module, args, y: calls.append(y.shape))
    assert exchange.accelerate(ours) is ours
    assert [id(p) for p in ours.parameters()] == identities
    assert list(ours.state_dict()) == names
    x, weights = rows(17), torch.randn(17, E, 3)
    (ours(x) * weights).sum().backward()
    optimizer.step()
    assert calls == [(17, E, 9)]
    (reference(x) * weights).sum().backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for p, q in zip(ours.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_accelerated_model_is_copied_pickled_compiled_and_accelerated_again(lib):
    model = exchange.accelerate(model_of(lib, "tabm")).double()
    x = rows(5, dtype=torch.float64)
    expected = gradients(model, x, torch.ones(5, E, 3, dtype=torch.float64))
    if lib is Tabm:  # a class inside of another: the copy of a whole model is tabm's business
        model = model.backbone.blocks
        model = nn.Sequential(*(layer for block in model for layer in block))
        expected = gradients(model, x, torch.ones(5, E, 9, dtype=torch.float64))
    ones = torch.ones_like(expected["output"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), exchange.accelerate(model), compiled):
        found = gradients(again, x, ones)
        for value, actual in zip(expected.values(), found.values()):
            torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)


def test_activations_are_computed_with_layers_only_where_nothing_else_sees_them(lib):
    def block(*after: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer_of(lib, "LinearEnsemble"), *after)

    fused, approximate, hooked = block(nn.ReLU()), block(nn.GELU("tanh")), block(nn.ReLU())
    hooked[0].register_forward_hook(lambda module, args, y: None)
    used_twice = block(nn.ReLU())
    model = nn.ModuleList([fused, approximate, hooked, used_twice, used_twice[0]])
    plain = copy.deepcopy(model)
    exchange.accelerate(model)
    assert [part[0].activation for part in model[:4]] == ["relu", None, None, None]
    assert [type(part[1]) for part in model[:4]] == [nn.Identity, nn.GELU, nn.ReLU, nn.ReLU]
    for ours, theirs in zip(model, plain):
        assert_same(ours, theirs, rows(17))

    def named_zero(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"0.{name}": value for name, value in state.items()}

    taken = exchange.from_layer(fused[0])
    assert_same(taken, plain[0], rows(17), state_of=lambda layer: named_zero(exchange.state_dict(layer)))


# ---------------------------------------------------------------------------------------------- bad input


def test_layers_without_a_counterpart_are_refused(lib):
    affine = lib.ElementwiseAffine((E, I), bias=True, **({} if lib is Tabm else {"scaling_init": "ones"}))
    for refused in (affine, nn.Linear(I, O), ek.nn.EnsembleLinear(I, O, E)):
        with pytest.raises(ValueError, match=rf"from_layer: layer should be .*, got {type(refused).__name__}$"):
            exchange.from_layer(refused)
    with pytest.raises(ValueError, match=r"accelerate: model should be with layers of tabm .*ElementwiseAffine$"):
        exchange.accelerate(nn.Sequential(affine))


def test_models_without_its_layers_are_refused():
    with pytest.raises(ValueError, match=r"with layers of tabm \(LinearBatchEnsemble, .*\), got Linear without any"):
        exchange.accelerate(nn.Linear(I, O))
    with pytest.raises(ValueError, match=r"counterpart, got MixtureLinear at '0'"):
        exchange.state_dict(nn.Sequential(ek.nn.MixtureLinear(I, O, E, num_templates=2)))
    with pytest.raises(ValueError, match=r"a bias per member, got shared_bias=True at ''"):
        exchange.state_dict(ek.nn.BatchEnsembleLinear(I, O, E, shared_bias=True))


@pytest.mark.parametrize("call", [exchange.accelerate, exchange.from_layer, exchange.state_dict])
def test_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"should be a torch\.nn\.Module, got dict"):
        call({})


def test_states_that_do_not_fit_are_refused_before_anything_is_loaded():
    layer = ek.nn.EnsembleLinear(I, O, E)
    before, good = layer.weight.clone(), Tabm.LinearEnsemble(I, O, k=E).state_dict()
    bad = {
        r"with a tensor 'bias', got none": {"weight": good["weight"]},
        r"of the model's layers alone, got also 'r'": {**good, "r": good["bias"]},
        r"state\['weight'\] should be of shape \[4, 7, 5\], got .*\[4, 5, 7\]": {**good, "weight": good["weight"].mT},
        r"with a tensor 'bias', got list": {**good, "bias": [1.0]},
    }
    for message, state in bad.items():
        with pytest.raises(ValueError, match=message):
            exchange.load_state_dict(layer, state)
    with pytest.raises(TypeError, match="state should be a state_dict, got list"):
        exchange.load_state_dict(layer, [])
    assert torch.equal(layer.weight, before)


def test_states_of_no_tabm_are_refused():
    good = {name: model_of(Tabm, name).state_dict() for name in ARCHITECTURES}
    first, second = "backbone.blocks.0.0.weight", "backbone.blocks.1.0.weight"
    bad = [
        ({}, "of a tabm.TabM, got no backbone.blocks.0.0.weight"),
        (
            {**good["tabm"], "num_module.linear.weight": torch.ones(2)},
            "leave out the others.*'num_module.linear.weight'",
        ),
        ({**good["tabm"], second: torch.randn(9, 8)}, r"blocks\.1\.0\.weight of 9 inputs"),
        ({**good["tabm"], first: torch.randn(9)}, r"'backbone\.blocks\.0\.0\.weight' of 2 axes, got float32\[9\]"),
        ({**good["tabm"], "output.weight": torch.randn(E + 1, 9, 3)}, "of 4 members everywhere, got 5"),
        ({**good["tabm-mini"], "backbone.affine.bias": torch.randn(E, I)}, "also 'backbone.affine.bias'"),
        ({**good["tabm-packed"], "backbone.blocks.0.0.bias": torch.randn(9)}, r"of shape \[4, 9\]"),
        (
            {n: t for n, t in good["tabm"].items() if n != "backbone.blocks.1.0.s"},
            r"with a tensor '.*1\.0\.s', got none",
        ),
    ]
    for state, message in bad:
        with pytest.raises(ValueError, match=message):
            exchange.from_state(state)
    with pytest.raises(ValueError, match="from_state: activation should be one of"):
        exchange.from_state(good["tabm"], activation="mish")
    with pytest.raises(TypeError, match="state should be a state_dict"):
        exchange.from_state(None)


def test_input_of_another_number_of_members_is_refused():
    for model in (
        exchange.from_state(model_of(Tabm, "tabm").state_dict()),
        exchange.accelerate(model_of(Tabm, "tabm")),
    ):
        with pytest.raises(ValueError, match=r"input should be \[B, E, I\] with E=4"):
            model(torch.randn(17, E + 1, I))
