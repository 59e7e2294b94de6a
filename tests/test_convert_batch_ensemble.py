"""ek.convert(model, "batch_ensemble", ...): members are the model with weights s W r of their own, whatever it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from batch_ensemble_cases import MODELS, Encoder, Residual, Words, made, tensors
from torch import Tensor, nn
from torch.func import functional_call

import effens_kernels as ek

E, B = 3, 2
models = pytest.mark.parametrize("name", MODELS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def converted(model: nn.Module | None = None, **options: object) -> ek.ensembles.BatchEnsemble:
    return ek.convert(
        Residual() if model is None else model, "batch_ensemble", options.pop("num_members", E), **options
    )


# ----------------------------------------------------------------------------------------------------------- values


def scaled(plain: nn.Module, ours: nn.Module, e: int) -> dict[str, Tensor]:
    """Parameters of torch.nn's layer for a member, by the formula, from those of ours."""
    if isinstance(plain, nn.MultiheadAttention):
        parts = ["in"] if plain.in_proj_weight is not None else ["q", "k", "v"]
        s = ours.in_proj_s[e].chunk(len(parts))
        weights = [
            getattr(ours, f"{part}_proj_weight") * own[:, None] * getattr(ours, f"{part}_proj_r")[e]
            for part, own in zip(parts, s)
        ]
        found = {f"{part}_proj_weight": weight for part, weight in zip(parts, weights)}
        return found if plain.in_proj_bias is None else {**found, "in_proj_bias": ours.in_proj_bias[e]}
    if isinstance(plain, nn.Embedding):
        return {"weight": ours.weight * ours.s[e]}
    own = {name: p[e] for name, p in ours.named_parameters(recurse=False) if p.shape[0] == E and name != "weight"}
    if isinstance(plain, nn.Linear):
        weight = ours.weight * ours.s[e][:, None] * ours.r[e]
    elif isinstance(plain, nn.modules.conv._ConvNd):
        first, second = (ours.r, ours.s) if plain.transposed else (ours.s, ours.r)
        per_group = second[e].view(plain.groups, -1).repeat_interleave(len(ours.weight) // plain.groups, 0)
        scale = first[e][:, None] * per_group
        weight = ours.weight * scale.view(*scale.shape, *(1,) * len(plain.kernel_size))
    elif isinstance(plain, nn.PReLU):
        return {"weight": ours.weight}
    else:
        return {name: p[e] for name, p in ours.named_parameters(recurse=False)}
    return {"weight": weight} | ({"bias": own["bias"]} if "bias" in own else {})


def naive(model: nn.Module, ensemble: nn.Module, e: int, *inputs: Tensor) -> tuple[object, dict[str, Tensor]]:
    """The model's forward code with the weights of a member, and its buffers afterwards."""
    model = copy.deepcopy(model)
    state: dict[str, Tensor] = {}
    for path, plain in model.named_modules():
        for name, p in list(plain._parameters.items()):
            if p is not None:  # no longer tied
                plain._parameters[name] = nn.Parameter(p.detach().clone())
        ours = ensemble.model.get_submodule(path)
        prefix = f"{path}." if path else ""
        if plain._parameters:
            state |= {prefix + name: p for name, p in scaled(plain, ours, e).items()}
        state |= {prefix + name: b[e].clone() for name, b in ours.named_buffers(recurse=False)}
    assert set(state) == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    y = functional_call(model, state, inputs)
    return y, {name: state[name] for name, _ in model.named_buffers()}


@models
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_members_are_scaled_models(name, training):
    """Results, running statistics and gradients of all parameters, of the same rows and of rows of each member's."""
    model = made(name).train(training)
    ensemble = converted(model, std=0.4)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.mul_(1 + 0.2 * torch.randn_like(p))
    members = [ensemble.member(e) for e in range(E)]
    for x, per_member in ((MODELS[name][1](B), False), (MODELS[name][1](E, B), True)):
        expected = [naive(model, ensemble, e, x[e] if per_member else x) for e in range(E)]
        y = tensors(ensemble(x, per_member=per_member))
        alone = [tensors(member(x[e] if per_member else x)) for e, member in enumerate(members)]
        loops = [tensors(result) for result, _ in expected]
        for n, part in enumerate(y):
            close(part, torch.stack([loop[n] for loop in loops]))
            close(part, torch.stack([loop[n] for loop in alone]))
        for path, buffer in ensemble.model.named_buffers():
            close(buffer, torch.stack([buffers[path] for _, buffers in expected]))
        grads = [torch.randn_like(part) for part in y]
        own = [p for p in ensemble.parameters() if p.requires_grad]
        results = [
            torch.autograd.grad([(part * grad).sum() for part, grad in zip(parts, grads)], own, materialize_grads=True)
            for parts in (y, [torch.stack(parts) for parts in zip(*loops)])
        ]
        for actual, grad in zip(*results):
            close(actual, grad)


@models
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_ones_are_the_model(name, training):
    model = made(name).train(training)
    ensemble = converted(model, scale_init="ones")
    x = MODELS[name][1](B)
    y, expected = tensors(ensemble(x)), tensors(model(x))
    for part, one in zip(y, expected):
        for e in range(E):
            close(part[e], one)
    for path, buffer in model.named_buffers():
        close(ensemble.model.get_buffer(path)[1], buffer)


@pytest.mark.parametrize("exclude", [(), "encoder.layers.*.self_attn", nn.MultiheadAttention, "encoder.layers.0"])
@pytest.mark.parametrize("method", ["batch_ensemble", "mixture"])
def test_no_kernel_of_one_member_runs_in_inference(method, exclude):
    """Torch's encoders have fast paths that read parameters of their layers, whoever holds them."""
    if method == "mixture" and exclude in ((), "encoder.layers.0"):
        return  # which has no attention
    ensemble = ek.convert(Encoder().eval(), method, E, exclude=exclude, **{"std": 0.5} if method != "mixture" else {})
    members = [ensemble.member(e) for e in range(E)]
    x, padding = torch.randn(4, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4], [1]])
    for inputs in ((x,), (x, padding)):
        expected = torch.stack([member(*inputs) for member in members])
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                torch.testing.assert_close(ensemble(*inputs), expected.detach(), rtol=1e-4, atol=1e-5)


@models
def test_no_rows(name):
    model = made(name).eval()
    x = MODELS[name][1](0)
    for part, one in zip(tensors(converted(model)(x)), tensors(model(x))):
        assert part.shape == (E, *one.shape)


# ---------------------------------------------------------------------------------------------------- how it begins


def test_how_scales_begin():
    model = nn.Sequential(nn.Linear(200, 300), nn.Embedding(300, 200))
    for options, std in (({}, 0.1), ({"std": 0.5}, 0.5)):
        ensemble = converted(model, **options)
        for scale in (ensemble.model[0].r, ensemble.model[0].s, ensemble.model[1].s):
            assert abs(scale.mean().item() - 1) < 5 * std / scale.numel() ** 0.5
            assert abs(scale.std().item() / std - 1) < 0.2
    signs = converted(model, scale_init="random_sign").model[0].r
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert (converted(model, scale_init="ones").model[1].s == 1).all()


def test_members_begin_near_the_model():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    x = torch.randn(50, 64)
    y = converted(model, num_members=8)(x)
    far = (y - model(x)).norm(dim=(1, 2)) / model(x).norm()
    assert (far > 0.01).all()
    assert (far < 0.6).all()
    signs = converted(model, num_members=8, scale_init="random_sign")(x)
    assert ((signs - model(x)).norm(dim=(1, 2)) / model(x).norm() > 0.7).all()


def test_what_is_kept_of_the_model():
    model = Residual().eval()
    model.norm.train()
    model.head.weight.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    ensemble = converted(model)
    assert not ensemble.training
    assert ensemble.model.norm.training
    assert not ensemble.model.head.weight.requires_grad
    assert not ensemble.member(0).head.weight.requires_grad
    assert ensemble.model.again is ensemble.model.block
    member = ensemble.member(2)
    assert member.again is member.block
    assert type(ensemble.model) is Residual
    assert set(before) <= {name.removeprefix("model.") for name in ensemble.state_dict()}
    for weight in (ensemble.model.stem.weight, ensemble.member(1).stem.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    ensemble.train()(torch.randn(B, 3, 6, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_weights_stay_tied():
    for options in ({}, {"exclude": "embedding"}, {"exclude": "head"}, {"include": "head"}):
        ensemble = converted(Words(), **options)
        assert ensemble.model.head.weight is ensemble.model.embedding.weight
        assert sum(n.endswith("embedding.weight") for n, _ in ensemble.named_parameters()) == 1
    both = copy.deepcopy(converted(Words()))
    assert both.model.head.weight is both.model.embedding.weight


def test_include_and_exclude():
    def replaced(model: nn.Module, **options: object) -> set[str]:
        ensemble = converted(model, **options)
        plain = dict(model.named_modules())
        return {path for path, m in ensemble.model.named_modules() if type(m) is not type(plain[path])}

    assert replaced(Residual()) == {"stem", "norm", "block.0", "block.1", "head"}
    assert replaced(Residual(), exclude=(nn.GroupNorm, "head")) == {"stem", "norm", "block.0"}
    assert replaced(Residual(), include="block") == {"block.0", "block.1"}
    layers = {f"encoder.layers.{n}.{part}" for n in range(2) for part in ("linear1", "linear2", "norm1", "norm2")}
    attention = {f"encoder.layers.{n}.self_attn{part}" for n in range(2) for part in ("", ".out_proj")}
    assert replaced(Encoder()) == layers | attention | {"head"}
    assert replaced(Encoder(), exclude=nn.MultiheadAttention) == layers | {"head"}
    assert replaced(Encoder(), include=nn.MultiheadAttention) == attention
    assert replaced(Encoder(), include=nn.Linear) == {p for p in layers if "linear" in p} | {"head"}


def test_summary_and_optimizer_groups():
    ensemble = converted(Encoder())
    summary = ensemble.summary()
    mlp, attention = 2 * (8 * 12 * 2) + 8 * 3, 2 * (24 * 8 + 8 * 8)
    own_mlp, own_attention = 2 * (8 + 12 + 12 + 12 + 8 + 8) + 8 + 3 + 3, 2 * (8 + 24 + 24 + 8 + 8 + 8)
    assert set(summary.rows) == {
        ("MultiheadAttention", 2, attention, own_attention),
        ("Linear", 5, mlp, own_mlp),
        ("LayerNorm", 4, 0, 4 * 16),
    }
    for each in (ensemble, converted(Words()), converted(exclude=nn.Conv2d)):
        total = each.summary().total
        assert total[2] + E * total[3] == sum(p.numel() for p in each.parameters())
        assert each.summary().notes[0].startswith(f"{total[2] + E * total[3]:,} parameters in all")
    assert converted(exclude=nn.Conv2d).summary().rows[-1] == ("shared as they are", 3, 8 * 27 + 8 * 36 + 8 + 1, 0)

    ensemble.model.head.weight.requires_grad_(False)
    trained = {n for n, p in ensemble.named_parameters() if p.requires_grad}
    scales = {n for n in trained if n.split(".")[-1] in ("r", "s", "in_proj_r", "in_proj_s")}
    norms = {n for n in trained if ".norm" in n}
    names = {id(p): n for n, p in ensemble.named_parameters()}
    assert len(scales) == 2 * 8 + 2
    for decay_norms, free in ((True, scales), (False, scales | norms)):
        decayed, spared = ensemble.optimizer_groups(5e-4, decay_norms=decay_norms)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
        assert {names[id(p)] for p in spared["params"]} == free
        assert {names[id(p)] for p in decayed["params"]} == trained - free


# ------------------------------------------------------------------------------------------------- as an nn.Module


def test_training_reduces_the_loss():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))
    ensemble = converted(model)
    x = torch.randn(64, 8)
    target = torch.tanh(x[:, :4] * x[:, 4:])
    optimizer = torch.optim.AdamW(ensemble.optimizer_groups(weight_decay=1e-3), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = (ensemble(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    y = ensemble(x)
    assert (y[0] - y[1]).abs().mean() > 1e-2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_copies(how, name):
    def make() -> nn.Module:
        return converted(MODELS[name][0]().double().eval())

    original = make()
    x = MODELS[name][1](B)
    expected = original(x)
    if how == "deepcopy":
        other = copy.deepcopy(original)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    else:
        other = make()
        other.load_state_dict(original.state_dict())
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x), expected)


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_compiled(name):
    ensemble = converted(MODELS[name][0]())
    compiled = torch.compile(copy.deepcopy(ensemble), fullgraph=True, backend="aot_eager")
    x = MODELS[name][1](B).float()
    results = []
    for module in (ensemble, compiled):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["residual", "encoder", "words"])
def test_low_precision(name):
    """Under autocast and in bfloat16, about as far from float64 as the members are."""
    ensemble = converted(MODELS[name][0]().double().eval())
    x = MODELS[name][1](B)
    exact = ensemble(x)
    low = copy.deepcopy(ensemble).bfloat16()
    half = x.bfloat16() if x.is_floating_point() else x
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(ensemble).float()(x.float() if x.is_floating_point() else x)
    for y, members in ((low(half), [low.member(e) for e in range(E)]), (mixed, None)):
        error = (y.double() - exact).abs().max()
        if members is None:
            assert error < 0.1 * exact.abs().max()
        else:
            loop = torch.stack([member(half) for member in members])
            assert error < 2 * (loop.double() - exact).abs().max() + 0.01 * exact.abs().max()


# -------------------------------------------------------------------------------------------------------- bad input


def hooked() -> nn.Module:
    model = Encoder()
    model.encoder.layers[1].self_attn.register_forward_hook(lambda module, inputs, output: None)
    return model


def tied_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    return model


def adapted() -> nn.Module:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    torch.nn.utils.parametrizations.weight_norm(model.out_proj)
    return model


BAD = {
    "scale_init": (
        lambda: converted(scale_init="zeros"),
        ValueError,
        "convert: scale_init should be one of 'normal', 'random_sign', 'ones', got 'zeros'",
    ),
    "std": (lambda: converted(std=-0.1), ValueError, "convert: std should be finite and at least 0, got -0.1"),
    "std_type": (lambda: converted(std="a"), TypeError, "convert: std should be a number, got 'a'"),
    "option": (
        lambda: converted(spread=1),
        TypeError,
        "spread should be an option of 'batch_ensemble': scale_init, std",
    ),
    "members": (lambda: converted(num_members=0), ValueError, "convert: num_members should be at least 1, got 0"),
    "nothing": (
        lambda: converted(nn.LayerNorm(4)),
        ValueError,
        "model should be with Linear, Conv1d, Conv2d, ConvTranspose2d, Embedding, MultiheadAttention to convert",
    ),
    "type": (lambda: converted(nn.Sequential(nn.Conv3d(1, 1, 1))), ValueError, "got Conv3d at '0'"),
    "recurrent": (lambda: converted(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))), ValueError, "got LSTM at '1'"),
    "instance": (
        lambda: converted(nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2, track_running_stats=True))),
        ValueError,
        "got InstanceNorm1d at '1'",
    ),
    "hooks": (lambda: converted(hooked()), ValueError, "got MultiheadAttention at 'encoder.layers.1.self_attn' with"),
    "tied_bias": (lambda: converted(tied_bias()), ValueError, "got bias of '1' tied to '0'"),
    "adapted": (
        lambda: converted(adapted()),
        ValueError,
        "got ParametrizedNonDynamicallyQuantizableLinear at 'out_proj'",
    ),
    "sequence_first": (
        lambda: converted(nn.TransformerEncoderLayer(8, 2, 12)),
        ValueError,
        "convert: model should be of rows in the first axis (batch_first=True, or inside of a module that transposes), "
        "got TransformerEncoderLayer without batch_first",
    ),
    "twice": (
        lambda: converted(converted()),
        ValueError,
        "convert: model should be plain, got BatchEnsemble at 'the mod",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)
