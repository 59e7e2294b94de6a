"""ek.convert(..., "sub_ensemble"): members equal plain models of one trunk, which runs once, whatever the code does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from convert_cases import CASES, B, ResNet, mlp
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import effens_kernels as ek
from effens_kernels.ensembles import _members
from effens_kernels.ops import _member_calls

E = 3
SPLITS = [(name, split) for name, case in CASES.items() for split in case.splits]
splits = pytest.mark.parametrize(("name", "split"), SPLITS, ids=[f"{name} at {split}" for name, split in SPLITS])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tensors(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def loss(result: object) -> Tensor:
    return sum((t * torch.linspace(0.1, 1.0, t.shape[-1], dtype=t.dtype)).square().sum() for t in tensors(result))


def made(name: str, split: str, **options: object) -> tuple[nn.Module, ek.ensembles.SubEnsemble, Tensor]:
    """A model with statistics of its own, its ensemble, and rows."""
    case = CASES[name]
    model = case.make().double()
    for path, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.0).sub_(0.0 if "var" in path else 0.75)
    ensemble = ek.convert(model, "sub_ensemble", E, split=split, **options)
    return model, ensemble, torch.randn(B, *case.shape, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- values


@splits
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_members_are_plain_models(name, split, training):
    """Results, gradients (of the trunk, the sum over members), and buffers, beside a loop over plain models."""
    model, ensemble, x = made(name, split)
    ensemble.train(training)
    members = [ensemble.member(e) for e in range(E)]
    x.requires_grad_()
    own = x.detach().clone().requires_grad_()
    result, expected = ensemble(x), [member(own) for member in members]
    assert pytree.tree_structure(result) == pytree.tree_structure(expected[0])
    for together, *one in zip(tensors(result), *map(tensors, expected)):
        close(together, torch.stack(one))
    loss(result).backward()
    sum(map(loss, expected)).backward()
    close(x.grad, own.grad)
    shared = ensemble.model.shared
    assert shared
    for path, parameter in ensemble.model.named_parameters():
        grads = [member.get_parameter(path).grad for member in members]
        close(parameter.grad, sum(grads) if path in shared else torch.stack(grads))
    for path, buffer in ensemble.model.named_buffers():
        one = [member.get_buffer(path) for member in members]
        close(buffer, one[0] if path in shared else torch.stack(one))
    for e, member in enumerate(members):
        assert [type(m) for m in member.modules()] == [type(m) for m in model.modules()]
        assert list(member.state_dict()) == list(model.state_dict())
        for a, b in zip(ensemble.member(e).buffers(), member.buffers()):
            close(a, b)


@splits
def test_the_models_weights_are_kept(name, split):
    """Those of the trunk always, and with keep_weights=True all: every member is the plain model."""
    model, ensemble, x = made(name, split, keep_weights=True, spread=0.0)
    ensemble.eval()
    for together, one in zip(tensors(ensemble(x)), tensors(model.eval()(x))):
        close(together, one.expand(E, *one.shape))
    _, ensemble, _ = made(name, split)
    assert {n for n in ensemble.model.shared if n in dict(model.named_parameters())} < set(model.state_dict())
    model = CASES[name].make()
    fresh = ek.convert(model, "sub_ensemble", E, split=split)
    for path, value in fresh.model.state_dict().items():
        if path in fresh.model.shared:
            assert torch.equal(value, model.state_dict()[path])
        elif value.dim() > 2:
            assert not torch.equal(value[0], value[1])
            assert not torch.equal(value[0], model.state_dict()[path])


@pytest.mark.parametrize("name", ["skips", "tokens", "images to linear"])
def test_rows_of_each_member(name):
    _, ensemble, _ = made(name, CASES[name].splits[0])
    ensemble.eval()
    x = torch.randn(E, B, *CASES[name].shape, dtype=torch.float64)
    result = ensemble(x, per_member=True)
    for e in range(-E, E):
        for together, one, alone in zip(
            tensors(result), tensors(ensemble.member(e)(x[e])), tensors(ensemble(x[e], member=e))
        ):
            close(together[e], one)
            close(alone, one)


def test_head_begins_around_the_model():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 200))
    ensemble = ek.convert(model, "sub_ensemble", E, split="1", keep_weights=True, spread=0.2)
    weights, plain = ensemble.model.get_parameter("1.weight"), model[1].weight
    noise = (weights - plain) / plain.square().mean().sqrt()
    close(noise.flatten(1).std(1), torch.full((E,), 0.2), 0.02)
    assert noise.flatten(1).corrcoef().triu(1).abs().max() < 0.05
    assert torch.equal(ensemble.model.get_parameter("1.bias"), model[1].bias.expand(E, -1))


def test_fresh_heads_are_drawn_as_torch_draws():
    model = mlp()
    model[4].running_mean.fill_(3.0)
    torch.manual_seed(0)
    ensemble = ek.convert(model, "sub_ensemble", E, split="3")
    torch.manual_seed(0)
    for e in range(E):
        first, last = nn.Linear(8, 7, bias=False), nn.Linear(7, 3)
        assert torch.equal(ensemble.model.get_parameter("7.bias")[e], last.bias)
        assert torch.equal(ensemble.model.get_parameter("3.weight")[e], first.weight)
    assert not ensemble.model.get_buffer("4.running_mean").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_no_rows(dtype):
    _, ensemble, x = made("resnet", "layer2")
    wide = ensemble.eval()(x)
    low = ensemble.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    close(low.double(), wide, 20 * torch.finfo(dtype).eps)
    assert ensemble(x[:0].to(dtype)).shape == (E, 0, 5)


# -------------------------------------------------------------------------------------------------------- one trunk


class Products(TorchDispatchMode):
    """How many rows each weight (by its memory) has been multiplied with, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        at = {"aten::convolution": (0, 1), "aten::addmm": (1, 2), "aten::mm": (0, 1)}.get(func._schema.name)
        if at:
            x, weight = (args[n] for n in at)
            self.rows.setdefault(weight.data_ptr(), []).append(len(x))
        return func(*args, **(kwargs or {}))


@splits
def test_the_trunk_runs_once(name, split):
    """On B rows, as in the plain model."""
    model, ensemble, x = made(name, split)
    counts = []
    for run in (model, ensemble):
        with Products() as products, torch.no_grad():
            run(x)
        named = run.named_parameters() if run is model else ensemble.model.named_parameters()
        counts.append({path: products.rows[p.data_ptr()] for path, p in named if p.data_ptr() in products.rows})
    before, counts = counts
    trunk = {path for path in before if path in ensemble.model.shared}
    assert trunk
    assert {path: counts[path] for path in trunk} == {path: before[path] for path in trunk}


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_leaves_the_trunk_shared(compiled):
    """Attention's too: all members, which are the same here, get the same; and some of it is dropped."""
    layer = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.4, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(6, 3)).double()
    ensemble = ek.convert(model, "sub_ensemble", E, split="1", keep_weights=True, spread=0.0)
    run = torch.compile(ensemble, fullgraph=True, backend="aot_eager") if compiled else ensemble
    x = torch.randn(B, 5, 6, dtype=torch.float64)
    first, second = run(x), run(x)
    assert torch.equal(first[1:], first[:-1])
    assert not torch.equal(first, second)
    if not compiled:
        with Products() as products, torch.no_grad():
            ensemble(x)
        weight = ensemble.model.get_parameter("0.linear1.weight")
        assert products.rows[weight.data_ptr()] == [B * 5]


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_dropout(kind, where):
    """Half of the values (or of the channels) are 0, the others doubled, alike for members if in the trunk."""
    model = nn.Sequential(kind(0.5, inplace=True), nn.Linear(2, 2), nn.Linear(2, 2)).double()
    ensemble = ek.convert(model, "sub_ensemble", E, split="1" if where == "trunk" else "0")
    with torch.no_grad():
        for path, p in ensemble.named_parameters():
            p.copy_(torch.eye(2) if "weight" in path else torch.zeros(2))
    axes = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}[kind]
    x = torch.rand(40, 16, *(2,) * max(axes, 1), dtype=torch.float64) + 1
    factors = ensemble(x.clone()) / x
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    close(factors.mean(), torch.tensor(1.0, dtype=torch.float64), 0.3)
    if axes:
        assert torch.equal(factors, factors[(..., *(slice(0, 1),) * axes)].expand_as(factors))
    assert all(torch.equal(factors[0], other) == (where == "trunk") for other in factors[1:])
    assert type(ensemble.member(0)[0]) is kind
    assert torch.equal(ensemble.eval()(x), x.expand(E, *x.shape))


@pytest.mark.parametrize("setting", ["plain", "causal", "bool", "float", "grouped"])
def test_attention_that_drops(monkeypatch, setting):
    """Without dropping, by PyTorch's attention; what is dropped are its weights."""
    q, k, v = torch.randn(3, B, 4, 5, 6, dtype=torch.float64)
    options = {
        "plain": {"scale": 0.3},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.rand(B, 1, 5, 5) < 0.8},
        "float": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        "grouped": {"enable_gqa": True},
    }[setting]
    if setting == "bool":
        options["attn_mask"][..., 0] = True
    if setting == "grouped":
        k, v = k[:, :2], v[:, :2]
    monkeypatch.setattr(_member_calls, "shared_noise", lambda like, p: torch.ones_like(like))
    mode = _members.Fused(E, True, True)
    with mode:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **options)
    close(y, F.scaled_dot_product_attention(q, k, v, **options))
    monkeypatch.setattr(_member_calls, "shared_noise", lambda like, p: torch.full_like(like, p))
    with mode:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **options)
    close(y, 0.3 * F.scaled_dot_product_attention(q, k, v, **options))


def test_frozen_trunk():
    """No gradients, no new statistics, nothing dropped there; heads train."""
    model, ensemble, x = made("resnet", "layer2", freeze_trunk=True)
    assert ensemble.training
    before = copy.deepcopy(ensemble.model.state_dict())
    for mode in (True, False, True):
        ensemble.train(mode)
        plain = ensemble.model._plain
        assert (plain.norm.training, plain.layer1.norm1.training, plain.layer2.training) == (False, False, mode)
    loss(ensemble(x)).backward()
    shared = ensemble.model.shared
    for path, parameter in ensemble.model.named_parameters():
        assert (parameter.grad is None) == (path in shared) != parameter.requires_grad
    for path, buffer in ensemble.model.named_buffers():
        assert torch.equal(buffer, before[path]) == (path in shared)
    y = ensemble(torch.randn(E, B, 3, 6, 5, dtype=torch.float64), per_member=True)
    assert y.shape == (E, B, 5)
    assert model.stem.weight.requires_grad
    dropping = ek.convert(mlp(0.5), "sub_ensemble", 2, split="7", freeze_trunk=True, keep_weights=True, spread=0.0)
    x = torch.randn(B, 6)
    torch.testing.assert_close(dropping(x)[1], dropping.member(0).eval()(x))


def test_include_and_exclude():
    def own(**options: object) -> set[str]:
        ensemble = ek.convert(ResNet(), "sub_ensemble", E, **options)
        x = torch.randn(B, 3, 6, 5)
        ensemble.eval()
        torch.testing.assert_close(ensemble(x)[1], ensemble.member(1)(x))
        return {path.rpartition(".")[0] for path in ensemble.model.state_dict() if path not in ensemble.model.shared}

    assert own(split="fc") == own(include="fc") == own(include=nn.Linear) == {"fc"}
    norms = {f"layer2.{n}.norm{m}" for n in (0, 1) for m in (1, 2)}
    assert own(split="layer2", include=nn.BatchNorm2d) == norms
    assert own(split="layer2", exclude=[nn.BatchNorm2d, "layer2.0.*", "fc"]) == {"layer2.1.conv1", "layer2.1.conv2"}
    assert own(include=["stem", "fc"]) == {"stem", "fc"}  # what lies between is computed for each member


# --------------------------------------------------------------------------------------------------- as an nn.Module


def test_the_given_model_stays_as_it_is():
    model = ResNet().eval()
    model.layer1.train()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    ensemble = ek.convert(model, "sub_ensemble", E, split="layer2")
    assert not ensemble.training
    assert ensemble.model.layer1.norm1.training
    assert not ensemble.model.fc.weight.requires_grad
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    ensemble.train()(torch.randn(B, 3, 6, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = torch.get_rng_state()
    ensemble.member(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies(how):
    def make() -> nn.Module:
        return ek.convert(mlp(0.5), "sub_ensemble", E, split="3", freeze_trunk=True)

    original = make().eval()
    x = torch.randn(B, 6)
    expected = original(x)
    if how == "state_dict":
        other = make().eval()
        other.load_state_dict(original.state_dict())
    else:
        other = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert torch.equal(other(x), expected)
    assert torch.equal(other.member(2)(x), original.member(2)(x))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x), expected)
    assert not other.train().model._plain[2].training


def test_moves():
    _, ensemble, x = made("resnet", "layer2")
    expected = ensemble.eval()(x)
    assert ensemble.to(memory_format=torch.channels_last) is ensemble
    assert ensemble.model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert ensemble.model.layer2.get_submodule("0").conv1.weight[1].is_contiguous(memory_format=torch.channels_last)
    close(ensemble(x), expected)
    close(ensemble.float()(x.float()).double(), expected, 1e-4)
    assert ensemble.to("meta")(x.float().to("meta")).shape == (E, B, 5)


def test_compiled():
    _, ensemble, x = made("skips", "up")
    compiled = torch.compile(copy.deepcopy(ensemble), fullgraph=True, backend="aot_eager")
    results = []
    for module in (ensemble, compiled):
        y = module(x)
        results.append([y, *torch.autograd.grad(loss(y), list(module.parameters())), *module.buffers()])
    for actual, expected in zip(*results):
        close(actual, expected)


def test_a_training_step_is_that_of_the_members():
    """With a frozen trunk, members train as if each were alone."""
    _, ensemble, x = made("resnet", "layer2", freeze_trunk=True)
    members = [ensemble.member(e) for e in range(E)]
    for member in members:
        for path in ensemble.trunk:
            member.get_submodule(path).eval()
    for model in (ensemble, *members):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
    for e, member in enumerate(members):
        for path, value in ensemble.member(e).state_dict().items():
            close(value, member.state_dict()[path])


def test_summary():
    ensemble = ek.convert(mlp(), "sub_ensemble", E, split="3")
    own, plain = 56 + 14 + 24, 56 + 56 + 14 + 24
    summary = ensemble.summary()
    assert summary.rows == (("trunk", 56, 0), ("heads, from '3'", 0, own))
    assert summary.total == ("all", 56, own)
    assert sum(p.numel() for p in ensemble.parameters()) == 56 + E * own
    assert summary.notes[0] == f"{56 + E * own:,} parameters in all, {(56 + E * own) / plain:.2f} times the plain model"
    pytest.importorskip("rich")
    assert "Sub-ensemble of 3 members" in str(summary)


# -------------------------------------------------------------------------------------------------------- bad input


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.embed(x)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def sub(model: nn.Module | None = None, **options: object) -> nn.Module:
    options = {"num_members": E, "split": "3", **options}
    return ek.convert(mlp() if model is None else model, "sub_ensemble", **options)


BAD = {
    "no_split": (
        lambda: sub(split=None),
        ValueError,
        "convert: split should be the path of a module in the model (or in",
    ),
    "split": (
        lambda: sub(split="head"),
        ValueError,
        "convert: split should be the path of a module in the model, got 'head'",
    ),
    "whole": (lambda: sub(split=""), ValueError, "convert: split should be the path of a module in the model, got ''"),
    "split_type": (
        lambda: sub(split=3),
        TypeError,
        "convert: split should be the path of a module in the model, got 3",
    ),
    "no_parameters": (
        lambda: sub(nn.Sequential(mlp(), nn.Tanh()), split="1"),
        ValueError,
        "convert: split should be a mo",
    ),
    "spread": (lambda: sub(spread=-1.0), ValueError, "convert: spread should be at least 0, got -1.0"),
    "spread_nan": (lambda: sub(spread=float("nan")), ValueError, "convert: spread should be at least 0, got nan"),
    "spread_type": (lambda: sub(spread="1"), TypeError, "convert: spread should be a number, got '1'"),
    "members": (lambda: sub(num_members=0), ValueError, "convert: num_members should be at least 1, got 0"),
    "option": (
        lambda: sub(budget=3),
        TypeError,
        "convert: budget should be an option of 'sub_ensemble': split, keep_w",
    ),
    "tied": (lambda: sub(Tied(), split="hidden"), ValueError, "got weight of 'out' tied to 'embed'"),
    "hooks": (lambda: sub(hooked()), ValueError, "convert: model.0 should be without hooks"),
    "fresh": (
        lambda: sub(nn.Sequential(mlp(), Scale()), split="1"),
        ValueError,
        "convert: model should be of modules with reset_parameters (keep_weights=True begins at the model's, "
        "exclude=['1'] keeps them), got Scale at '1' with scale and without",
    ),
    "ensemble": (lambda: sub(sub()), ValueError, "convert: model should be plain, got SubEnsemble"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)


def test_tied_parameters_may_be_shared():
    ensemble = ek.convert(Tied().double(), "sub_ensemble", E, split="hidden", exclude="out")
    x = torch.randint(7, (B,))
    close(ensemble(x)[1], ensemble.member(1)(x))
    assert ensemble.model.out.weight is ensemble.model.embed.weight


def test_what_cannot_run_is_named():
    ensemble = ek.convert(ResNet(), "sub_ensemble", E, split="layer2")
    with pytest.raises(
        RuntimeError, match=r"convert: norm \(BatchNorm2d\) .* since it updates running statistics that all m"
    ):
        ensemble(torch.randn(E, B, 3, 6, 5), per_member=True)
    with pytest.raises(ValueError, match=r"input should be \[E=3, ...\] with per_member=True"):
        ensemble(torch.randn(4, B, 3, 6, 5), per_member=True)
    skips = ek.convert(CASES["skips"].make(), "sub_ensemble", E, include="down1")
    with pytest.raises(RuntimeError, match="convert: average cannot be assigned for all members at once"):
        skips(torch.randn(B, 2, 8))
    with pytest.raises(IndexError, match=r"SubEnsemble: member should be in \[-3, 3\), got 3"):
        ensemble.member(E)
