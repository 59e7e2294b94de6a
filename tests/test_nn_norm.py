"""Normalizations equal as many of torch.nn's as there are members: values, statistics, gradients, layouts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from effens_kernels.nn import EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleLayerNorm

E, B, C = 3, 10, 6
DOUBLE = {"dtype": torch.float64}
LAYOUTS = {"members_first": {}, "batch_first": {"batch_first": True}, "tiled": {"tiled": True}}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
BATCH_NORMS = {
    "1d": (EnsembleBatchNorm1d, nn.BatchNorm1d, (C,)),
    "1d-L": (EnsembleBatchNorm1d, nn.BatchNorm1d, (C, 5)),
    "2d": (EnsembleBatchNorm2d, nn.BatchNorm2d, (C, 5, 4)),
}
batch_norms = pytest.mark.parametrize("name", BATCH_NORMS)
OPTIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 1e-2},
    {"momentum": 0.3, "affine": False, "track_running_stats": False},
    {"momentum": 0.0},
]
options_of_batch_norm = pytest.mark.parametrize("options", OPTIONS, ids=str)


def stored(t: Tensor, layout: str) -> Tensor:
    """[E, B, ...] as the layer takes it and gives it."""
    if layout == "batch_first":
        return t.transpose(0, 1)
    return t.flatten(0, 1) if layout == "tiled" else t


def singles_of(norm: nn.Module, plain: type[nn.Module], options: dict) -> list[nn.Module]:
    """The members as layers of torch.nn, with random parameters that the ensemble gets too."""
    size = norm.num_features if hasattr(norm, "num_features") else norm.normalized_shape
    singles = [plain(size, **options, **DOUBLE) for _ in range(E)]
    for single in singles:
        for p in single.parameters():
            nn.init.normal_(p)
    state = {name: torch.stack([s.state_dict()[name] for s in singles]) for name in singles[0].state_dict()}
    norm.load_state_dict(state)
    return singles


def check_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def check_state(norm: nn.Module, singles: list[nn.Module], exact: bool = False) -> None:
    for name, value in norm.state_dict().items():
        expected = torch.stack([s.state_dict()[name] for s in singles])
        assert value.dtype == expected.dtype
        if exact:
            assert torch.equal(value, expected), name
        else:
            check_equal(value, expected)


# ------------------------------------------------------------------------------------------------------- batch norm


@batch_norms
@layouts
@options_of_batch_norm
def test_batch_norm_is_one_layer_per_member(name, layout, options):
    """Three training steps, then evaluation: outputs, all gradients and running statistics."""
    ensemble, plain, features = BATCH_NORMS[name]
    norm = ensemble(C, E, **options, **LAYOUTS[layout], **DOUBLE)
    singles = singles_of(norm, plain, options)
    for training in (True, True, True, False):
        norm.train(training)
        x = torch.randn(E, B, *features, **DOUBLE, requires_grad=True)
        y = norm(stored(x, layout))
        expected = torch.stack([single.train(training)(x_e) for single, x_e in zip(singles, x)])
        check_equal(y, stored(expected, layout))
        check_state(norm, singles)
        grad = torch.randn_like(expected)
        (actual,) = torch.autograd.grad(y, x, stored(grad, layout), retain_graph=True)
        check_equal(actual, torch.autograd.grad(expected, x, grad, retain_graph=True)[0])
        if norm.affine:
            grads = torch.autograd.grad(y, [norm.weight, norm.bias], stored(grad, layout))
            for a, kind in zip(grads, ("weight", "bias")):
                own = torch.autograd.grad(expected, [getattr(s, kind) for s in singles], grad, retain_graph=True)
                check_equal(a, torch.stack(own))


@pytest.mark.parametrize("name", ["1d", "2d"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_the_same_rows(name, batch_first, training):
    ensemble, plain, features = BATCH_NORMS[name]
    norm = ensemble(C, E, batch_first=batch_first, **DOUBLE).train(training)
    singles = singles_of(norm, plain, {})
    x = torch.randn(B, *features, **DOUBLE, requires_grad=True)
    y = norm(x)
    expected = torch.stack([single.train(training)(x) for single in singles])
    check_equal(y.transpose(0, 1) if batch_first else y, expected)
    check_state(norm, singles)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    check_equal(actual, torch.autograd.grad(expected, x, grad.transpose(0, 1) if batch_first else grad)[0])


@batch_norms
@pytest.mark.parametrize("shape", [(64, 32), (1000, 3), (7, 17)], ids=str)
def test_statistics_have_the_bits_of_single_layers(name, shape, threads):
    """float32, where an order of summing of its own would show; PyTorch's may depend on sizes with several threads."""
    threads(1)
    ensemble, plain, features = BATCH_NORMS[name]
    batch, channels = shape
    x = torch.randn(E, batch, channels, *features[1:])
    norm, singles = ensemble(channels, E), [plain(channels) for _ in range(E)]
    assert torch.equal(norm(x), torch.stack([single(x_e) for single, x_e in zip(singles, x)]))
    check_state(norm, singles, exact=True)


@batch_norms
@pytest.mark.parametrize("momentum", [0.2, None])
def test_batch_norm_of_one_member(name, momentum):
    """That member alone is updated, also where momentum is None and counts then differ."""
    ensemble, plain, features = BATCH_NORMS[name]
    norm = ensemble(C, E, momentum=momentum, **DOUBLE)
    singles = singles_of(norm, plain, {"momentum": momentum})
    for member in (1, -1, 1, 0):
        x = torch.randn(B, *features, **DOUBLE)
        check_equal(norm(x, member=member), singles[member](x))
        check_state(norm, singles)
    x = torch.randn(E, B, *features, **DOUBLE)
    check_equal(norm(x), torch.stack([single(x_e) for single, x_e in zip(singles, x)]))
    check_state(norm, singles)
    assert norm.num_batches_tracked.tolist() == [2, 3, 2]


@batch_norms
@pytest.mark.parametrize("options", [*OPTIONS, {"dtype": torch.float64}], ids=str)
def test_from_batchnorm(name, options):
    ensemble, plain, features = BATCH_NORMS[name]
    single = plain(C, **options)
    for p in single.parameters():
        nn.init.normal_(p)
    dtype = options.get("dtype", torch.float32)
    for _ in range(2):
        single(torch.randn(B, *features, dtype=dtype))
    if single.affine:
        single.bias.requires_grad_(False)
    single.eval()
    norm = ensemble.from_batchnorm(single, E, tiled=True)
    assert not norm.training
    for key, value in single.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value.expand(E, *value.shape))
        assert norm.state_dict()[key].dtype == value.dtype
    for key, p in single.named_parameters():
        assert dict(norm.named_parameters())[key].requires_grad == p.requires_grad
    x = torch.randn(B, *features, dtype=dtype)
    expected = single(x).repeat(E, *(1 for _ in x.shape[1:]))
    torch.testing.assert_close(norm(x.repeat(E, *(1 for _ in features))), expected, rtol=1e-5, atol=1e-5)


def test_channels_last_images_stay_so():
    norm = EnsembleBatchNorm2d(C, E)
    x = torch.randn(E * B, C, 5, 4).to(memory_format=torch.channels_last).view(E, B, C, 5, 4)
    assert norm(x).stride() == x.stride()


@pytest.mark.parametrize("batch_first", [False, True])
def test_images_of_batch_first_are_not_copied(batch_first):
    """Members and channels are one axis then, and torch's operation reads the input itself."""
    norm = EnsembleBatchNorm2d(C, E, batch_first=batch_first)
    x = torch.randn(*((B, E) if batch_first else (E, B)), C, 5, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x)
    assert y.is_contiguous()
    images = [t for t in kept if t.numel() * E >= x.numel()]
    assert {t.untyped_storage().data_ptr() for t in images} == {x.untyped_storage().data_ptr()}


# ------------------------------------------------------------------------------------------------------- layer norm


@layouts
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}], ids=str)
@pytest.mark.parametrize("shape", [C, (4, 5)], ids=str)
@pytest.mark.parametrize("extra", [(), (2,), (2, 3)], ids=str)
def test_layer_norm_is_one_layer_per_member(layout, options, shape, extra):
    norm = EnsembleLayerNorm(shape, E, **options, extra_dims=len(extra), **LAYOUTS[layout], **DOUBLE)
    singles = singles_of(norm, nn.LayerNorm, options)
    features = *extra, *((shape,) if isinstance(shape, int) else shape)
    x = torch.randn(E, B, *features, **DOUBLE, requires_grad=True)
    pairs = [(norm(stored(x, layout)), [single(x_e) for single, x_e in zip(singles, x)])]
    if layout != "tiled":
        pairs.append((norm(x[0]), [single(x[0]) for single in singles]))
    for y, members in pairs:
        expected = torch.stack(members)
        check_equal(y, stored(expected, layout))
        grad = torch.randn_like(expected)
        (actual,) = torch.autograd.grad(y, x, stored(grad, layout), retain_graph=True)
        check_equal(actual, torch.autograd.grad(expected, x, grad, retain_graph=True)[0])
        for kind in dict(norm.named_parameters()):
            (actual,) = torch.autograd.grad(y, getattr(norm, kind), stored(grad, layout), retain_graph=True)
            own = torch.autograd.grad(expected, [getattr(s, kind) for s in singles], grad, retain_graph=True)
            check_equal(actual, torch.stack(own))
    for e in range(-E, E):
        check_equal(norm(x[0], member=e), singles[e](x[0]))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_from_layernorm(options):
    single = nn.LayerNorm((4, 5), eps=1e-3, **options).eval()
    for p in single.parameters():
        nn.init.normal_(p).requires_grad_(False)
    norm = EnsembleLayerNorm.from_layernorm(single, E, extra_dims=1)
    assert not norm.training
    assert (norm.eps, norm.extra_dims) == (1e-3, 1)
    assert not any(p.requires_grad for p in norm.parameters())
    x = torch.randn(B, 2, 4, 5)
    torch.testing.assert_close(norm(x), single(x).expand(E, -1, -1, -1, -1), rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------- as nn.Modules

LAYERS = {
    "BatchNorm1d": (lambda **o: EnsembleBatchNorm1d(C, E, **o), (C,)),
    "BatchNorm2d": (lambda **o: EnsembleBatchNorm2d(C, E, **o), (C, 5, 4)),
    "LayerNorm": (lambda **o: EnsembleLayerNorm(C, E, **o), (C,)),
}
layers = pytest.mark.parametrize("layer", LAYERS)


@layers
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies(layer, how, tmp_path):
    make, features = LAYERS[layer]
    original = make()
    original(torch.randn(E, B, *features) * 3 + 1)
    for p in original.parameters():
        nn.init.normal_(p)
    original.eval()
    x = torch.randn(B, *features)
    expected = original(x)
    if how == "deepcopy":
        other = copy.deepcopy(original)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    else:
        torch.save(original.state_dict(), tmp_path / "state.pt")
        other = make().eval()
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), expected)
    other.train()(torch.randn(E, B, *features))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x), expected)


def test_state_dict_keys():
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(EnsembleBatchNorm1d(C, E).state_dict()) == keys == list(nn.BatchNorm1d(C).state_dict())
    assert list(EnsembleBatchNorm2d(C, E, affine=False).state_dict()) == keys[2:]
    assert list(EnsembleBatchNorm2d(C, E, track_running_stats=False).state_dict()) == keys[:2]
    assert list(EnsembleBatchNorm2d(C, E, bias=False, track_running_stats=False).state_dict()) == keys[:1]
    assert list(EnsembleLayerNorm(C, E).state_dict()) == keys[:2]
    assert EnsembleLayerNorm((4, 5), E).weight.shape == (E, 4, 5)


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_to(layer, dtype):
    make, features = LAYERS[layer]
    norm = make(dtype=dtype)
    assert {p.dtype for p in norm.parameters()} == {dtype}
    assert norm(torch.randn(E, B, *features, dtype=dtype)).dtype == dtype
    assert norm.to(torch.float32)(torch.randn(E, B, *features)).dtype == torch.float32
    if hasattr(norm, "num_batches_tracked"):
        assert norm.num_batches_tracked.tolist() == [2] * E


@layers
def test_reset_parameters(layer):
    make, features = LAYERS[layer]
    norm = make()
    fresh = copy.deepcopy(norm.state_dict())
    norm(torch.randn(E, B, *features) + 1)
    for p in norm.parameters():
        nn.init.normal_(p)
    norm.reset_parameters()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


REPRS = {
    "EnsembleBatchNorm1d(num_features=6, num_members=3, eps=1e-05, momentum=0.1, affine=True, "
    "track_running_stats=True)": (lambda: EnsembleBatchNorm1d(C, E)),
    "EnsembleBatchNorm2d(num_features=6, num_members=3, eps=1e-05, momentum=None, affine=True, bias=False, "
    "track_running_stats=False, batch_first=True)": (
        lambda: EnsembleBatchNorm2d(C, E, momentum=None, bias=False, track_running_stats=False, batch_first=True)
    ),
    "EnsembleLayerNorm(normalized_shape=(6,), num_members=3, eps=1e-05, elementwise_affine=True)": (
        lambda: EnsembleLayerNorm(C, E)
    ),
    "EnsembleLayerNorm(normalized_shape=(4, 5), num_members=3, eps=1e-05, elementwise_affine=True, bias=False, "
    "extra_dims=1, tiled=True)": (lambda: EnsembleLayerNorm((4, 5), E, bias=False, extra_dims=1, tiled=True)),
}


@pytest.mark.parametrize("text", REPRS)
def test_repr(text):
    assert repr(REPRS[text]()) == text


@layers
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled(layer, training):
    torch._dynamo.reset()
    make, features = LAYERS[layer]
    norm, other = make().train(training), make().train(training)
    x = torch.randn(E, B, *features)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), other(x))
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------- bad input

NORM1, NORM2, LAYER = EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleLayerNorm
BAD_CONSTRUCTION = {
    "features_0": (lambda: NORM1(0, E), ValueError, "EnsembleBatchNorm1d: num_features should be at least 1, got 0"),
    "features_float": (lambda: NORM2(6.0, E), TypeError, "EnsembleBatchNorm2d: num_features should be an int, got 6.0"),
    "members_0": (lambda: NORM2(C, 0), ValueError, "EnsembleBatchNorm2d: num_members should be at least 1, got 0"),
    "layouts": (
        lambda: NORM1(C, E, batch_first=True, tiled=True),
        ValueError,
        "tiled should be False with batch_first",
    ),
    "from_other": (lambda: NORM1.from_batchnorm(nn.BatchNorm2d(C), E), TypeError, "a torch.nn.BatchNorm1d, got BatchN"),
    "from_2d": (
        lambda: NORM2.from_batchnorm(nn.LayerNorm(C), E),
        TypeError,
        "EnsembleBatchNorm2d.from_batchnorm: norm",
    ),
    "layer_members": (lambda: LAYER(C, 0), ValueError, "EnsembleLayerNorm: num_members should be at least 1, got 0"),
    "layer_shape_0": (lambda: LAYER((4, 0), E), ValueError, "EnsembleLayerNorm: normalized_shape should be at least 1"),
    "layer_shape_empty": (lambda: LAYER((), E), ValueError, "normalized_shape should be at least one size, got ()"),
    "layer_shape_word": (lambda: LAYER("6", E), TypeError, "normalized_shape should be an int, got '6'"),
    "layer_extra": (lambda: LAYER(C, E, extra_dims=-1), ValueError, "extra_dims should be at least 0, got -1"),
    "layer_extra_bool": (lambda: LAYER(C, E, extra_dims=True), TypeError, "extra_dims should be an int, got True"),
    "layer_layouts": (lambda: LAYER(C, E, batch_first=True, tiled=True), ValueError, "EnsembleLayerNorm: tiled should"),
    "from_norm": (
        lambda: LAYER.from_layernorm(nn.BatchNorm1d(C), E),
        TypeError,
        "a torch.nn.LayerNorm, got BatchNorm1",
    ),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_construction(name):
    make, error, words = BAD_CONSTRUCTION[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)


@layers
def test_wrong_layout(layer):
    make, features = LAYERS[layer]
    with pytest.raises(
        ValueError, match=rf"Ensemble{layer}: input should be \[E, B, .*\] with E=3 \(batch_first=False\)"
    ):
        make()(torch.zeros(B, E, *features))
    with pytest.raises(
        ValueError, match=rf"Ensemble{layer}: input should be \[B, E, .*\] with E=3 \(batch_first=True\)"
    ):
        make(batch_first=True)(torch.zeros(E, B, *features))
    more_axes = [] if layer == "LayerNorm" else [(E, B, 2, *features)]  # of tiled rows it takes any
    for shape in [(E * B + 1, *features), *more_axes]:
        with pytest.raises(ValueError, match=rf"Ensemble{layer}: input should be \[E\*B, .*\] with E=3 \(tiled=True\)"):
            make(tiled=True)(torch.zeros(shape))


@layers
def test_wrong_input(layer):
    make, features = LAYERS[layer]
    norm = make()
    with pytest.raises(TypeError, match=rf"Ensemble{layer}: input should be a torch.Tensor, got list"):
        norm([1.0])
    with pytest.raises(TypeError, match=rf"Ensemble{layer}: input should be a torch.Tensor, got list"):
        norm([1.0], member=0)
    with pytest.raises(ValueError, match=rf"Ensemble{layer}: input should be \[B, .*\] or \[E, B, "):
        norm(torch.zeros(C))
    wrong = (C + 1, *features[1:])
    with pytest.raises(ValueError, match=rf"Ensemble{layer}: input should be of .*6.*, got float32\[3, 10, 7"):
        norm(torch.zeros(E, B, *wrong))


@layers
def test_wrong_member(layer):
    make, features = LAYERS[layer]
    norm, x = make(), torch.zeros(B, *features)
    with pytest.raises(IndexError, match=rf"Ensemble{layer}: member should be in \[-3, 3\), got 3"):
        norm(x, member=E)
    with pytest.raises(TypeError, match=f"Ensemble{layer}: member should be None or an int, got 1.0"):
        norm(x, member=1.0)
    with pytest.raises(ValueError, match=rf"Ensemble{layer}: input should be \[B, .*\] when member is given"):
        norm(torch.zeros(1, E, B, *features), member=0)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_one_value_has_no_variance(name):
    ensemble, _, features = BATCH_NORMS[name]
    x = torch.zeros(E, 1, C, *(1 for _ in features[1:]))
    with pytest.raises(ValueError, match="input should be more than one value per feature and member, got float32"):
        ensemble(C, E)(x)
    with pytest.raises(ValueError, match="input should be more than one value"):
        ensemble(C, E)(x[0], member=0)
    assert ensemble(C, E).eval()(x).shape == x.shape


def test_results_may_be_changed_in_place():
    """Also where all members have the same ones."""
    layer = EnsembleLayerNorm(8, 3, elementwise_affine=False)
    x = torch.randn(4, 8)
    expected = torch.relu(torch.nn.functional.layer_norm(x, (8,)))
    assert torch.equal(torch.relu_(layer(x)), expected.expand(3, 4, 8))


def test_from_a_batchnorm_whose_statistics_were_switched_off():
    norm = torch.nn.BatchNorm1d(4)
    norm(torch.randn(9, 4))
    norm.track_running_stats = False
    layer = EnsembleBatchNorm1d.from_batchnorm(norm, 3)
    x = torch.randn(3, 7, 4)
    expected = torch.stack([norm(rows) for rows in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.running_mean[1], norm.running_mean)
