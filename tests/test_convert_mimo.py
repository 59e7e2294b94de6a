"""ek.convert(..., "mimo"): a plain network with wider ends, and batches in which members are independent."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from convert_cases import CASES, B, ResNet, Tokens, mlp
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import effens_kernels as ek
from effens_kernels.ensembles import mimo_batch

M = 3
DOUBLE = {"dtype": torch.float64}
ENDS = {"resnet": {"last": "fc"}, "tokens": {"first": "embed"}}  # the same as without
cases = pytest.mark.parametrize("name", CASES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tensors(result: object) -> list[Tensor]:
    return pytree.tree_leaves(result)


def loss(result: object) -> Tensor:
    return sum((t * torch.linspace(0.1, 1.0, t.shape[-1], dtype=t.dtype)).square().sum() for t in tensors(result))


def disturbed(ensemble: nn.Module) -> nn.Module:
    """With parameters and statistics of which no two are alike."""
    with torch.no_grad():
        for t in ensemble.state_dict().values():
            if t.is_floating_point():
                t.add_(0.3 * torch.rand_like(t))
    return ensemble


def widened(name: str, ensemble: nn.Module) -> nn.Module:
    """By hand: the plain class with layers of PyTorch that are M times as wide."""
    model = CASES[name].make().double()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    weights = ensemble.model.state_dict()
    for path, layer in layers.items():
        shape = weights[f"{path}.weight"].shape
        if shape == layer.weight.shape:
            continue
        assert (shape[0] // layer.weight.shape[0]) * (shape[1] // layer.weight.shape[1]) == M
        options = {"bias": layer.bias is not None}
        if not isinstance(layer, nn.Linear):
            options |= {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding")}
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, type(layer)(shape[1], shape[0], **options))
    model.double().load_state_dict(weights)
    return model


def heads(y: Tensor, name: str) -> Tensor:
    """[B, ..., M*O, ...] to [M, B, ..., O, ...]"""
    return torch.stack(y.chunk(M, 1 if name == "skips" else -1))


# ----------------------------------------------------------------------------------------------------------- values


@cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("per_member", [True, False], ids=["own rows", "same rows"])
def test_one_wide_network(name, training, per_member):
    """Results, gradients and statistics are those of a network that is given all inputs as channels."""
    case = CASES[name]
    ensemble = disturbed(ek.convert(case.make().double(), "mimo", M, **ENDS.get(name, {}))).train(training)
    plain = widened(name, ensemble).train(training)
    x = torch.randn(*(M,) * per_member, B, *case.shape, **DOUBLE, requires_grad=True)
    own = x.detach().clone().requires_grad_()

    result = ensemble(x, per_member=per_member)
    expected = plain(torch.cat(own.unbind() if per_member else [own] * M, case.axis))
    expected = pytree.tree_map(lambda y: heads(y, name), expected)
    assert pytree.tree_structure(result) == pytree.tree_structure(expected)
    for a, b in zip(tensors(result), tensors(expected)):
        close(a, b)
    loss(result).backward()
    loss(expected).backward()
    close(x.grad, own.grad)
    named = dict(ensemble.model.named_parameters())
    assert named.keys() == dict(plain.named_parameters()).keys()
    for path, parameter in plain.named_parameters():
        close(named[path].grad, parameter.grad)
    for path, buffer in plain.named_buffers():
        close(ensemble.model.get_buffer(path), buffer)


@cases
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_head_begins_as_the_model(name, count):
    """On repeated inputs, though members' inputs have weights of their own."""
    case = CASES[name]
    model = case.make().double().eval()
    ensemble = ek.convert(model, "mimo", count, spread=0.7)
    x = torch.randn(B, *case.shape, **DOUBLE)
    for y, one in zip(tensors(ensemble(x)), tensors(model(x))):
        close(y, one.expand(count, *one.shape))
    if count > 1:
        x = torch.randn(count, B, *case.shape, **DOUBLE)
        first, other = (tensors(ensemble(rows, per_member=True))[0] for rows in (x, x.flip(0)))
        assert not torch.allclose(first, other)


def test_without_spread_the_kept_weights_are_exact():
    """Weights over a power of two add up to what they were."""
    model = ResNet().eval()
    ensemble = ek.convert(model, "mimo", 4, spread=0.0)
    assert torch.equal(ensemble.member(2).stem.weight, model.stem.weight)
    assert torch.equal(ensemble.model.stem.weight[:, 3:6], model.stem.weight / 4)
    assert torch.equal(ensemble.model.fc.weight, model.fc.weight.repeat(4, 1))


@cases
def test_members_are_plain_models(name):
    """That give a head for repeated inputs."""
    case = CASES[name]
    model = case.make().double()
    ensemble = disturbed(ek.convert(model, "mimo", M)).eval()
    x = torch.randn(B, *case.shape, **DOUBLE)
    result = tensors(ensemble(x))
    for m in range(-M, M):
        member = ensemble.member(m)
        assert [type(part) for part in member.modules()] == [type(part) for part in model.modules()]
        assert {k: v.shape for k, v in member.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        for y, one in zip(result, tensors(member(x))):
            close(y[m], one)


def test_spread():
    """Noise of that size, relative to the weight, which sums to 0."""
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 3)).double()
    ensemble = ek.convert(model, "mimo", M, spread=0.4)
    plain = model[0].weight
    parts = torch.stack(ensemble.model[0].weight.chunk(M, 1)) * M - plain
    close(parts.sum(0), torch.zeros_like(plain))
    expected = 0.4 * (1 - 1 / M) ** 0.5 * plain.square().mean().sqrt()
    close(parts.square().mean((1, 2)).sqrt(), expected.expand(M), 0.02 * expected.item())


def test_without_the_weights():
    """Both ends are drawn as layers of their size; the rest stays."""
    model = mlp()
    ensemble = ek.convert(model, "mimo", 50, keep_weights=False)
    first, last = ensemble.model[0].weight, ensemble.model[7].weight
    close(first.abs().max(), torch.tensor((50 * 6) ** -0.5), 1e-3)
    close(last.abs().max(), torch.tensor(7**-0.5), 1e-2)
    assert torch.equal(ensemble.model[3].weight, model[3].weight)
    assert not torch.equal(last[:3], last[3:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_no_rows(dtype):
    ensemble = ek.convert(ResNet().double(), "mimo", M).eval()
    x = torch.randn(M, B, 3, 6, 5, **DOUBLE)
    wide = ensemble(x, per_member=True)
    low = ensemble.to(dtype)(x.to(dtype), per_member=True)
    assert low.dtype == dtype
    close(low.double(), wide, 20 * torch.finfo(dtype).eps)
    assert ensemble(x[0, :0].to(dtype)).shape == (M, 0, 5)


def test_the_network_runs_once():
    ensemble = ek.convert(ResNet(), "mimo", M)
    seen = []
    for path in ("layer1", "layer2.0.conv2", "fc"):
        ensemble.model.get_submodule(path).register_forward_hook(lambda module, given, y: seen.append(len(given[0])))
    ensemble(torch.randn(M, B, 3, 6, 5), per_member=True)
    assert seen == [B, B, B]


def test_code_around_the_network():
    """Sees the rows of all inputs: what comes before the first layer, and after the last."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.randn(6))
            self.first, self.hidden, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            x = (x - self.mean) * scale
            y = self.last(torch.tanh(self.hidden(torch.tanh(self.first(x)))))
            return x + y, y.softmax(-1)

    model = Around().double()
    ensemble = disturbed(ek.convert(model, "mimo", M))
    x, scale = torch.randn(M, B, 6, **DOUBLE), torch.rand(M, B, 1, **DOUBLE)
    result = ensemble(x, scale, per_member=True)
    inner = ensemble.model
    h = (x - inner.mean) * scale
    y = torch.tanh(F.linear(torch.cat(h.unbind(), 1), inner.first.weight, inner.first.bias))
    y = F.linear(torch.tanh(inner.hidden(y)), inner.last.weight, inner.last.bias).unflatten(1, (M, 6)).transpose(0, 1)
    close(result[0], h + y)
    close(result[1], y.softmax(-1))


# ------------------------------------------------------------------------------------------------- training batches


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_batch(repeats, share):
    rows = 40
    x = torch.arange(rows * 2).view(rows, 2)
    inputs, targets = mimo_batch(x, x[:, 0] * 10, M, input_repetition=share, batch_repetition=repeats)
    assert inputs.shape == (M, rows * repeats, 2)
    assert torch.equal(targets, inputs[..., 0] * 10)
    assert torch.equal(inputs[..., 1], inputs[..., 0] + 1)
    same = (targets == targets[0]).all(0)
    assert same[round(rows * repeats * (1 - share)) :].all()
    for member in targets:  # each row as often as any other
        assert torch.equal(member.unique(return_counts=True)[1], torch.full((rows,), repeats))
    apart = targets[:, : round(rows * repeats * (1 - share))]
    if share < 1:
        assert len(apart.unique(dim=0)) == M
        assert same[: apart.shape[1]].float().mean() < 0.5
    assert not torch.equal(targets[0], x[:, 0].repeat(repeats) * 10)


def test_batch_is_that_of_its_generator():
    x, y = torch.randn(12, 3), torch.randn(12, 2, 2)
    state = torch.get_rng_state()
    first = mimo_batch(x, y, M, generator=torch.Generator().manual_seed(3))
    again = mimo_batch(x, y, M, generator=torch.Generator().manual_seed(3))
    other = mimo_batch(x, y, M, generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert mimo_batch(x[:0], y[:0], M, batch_repetition=2)[1].shape == (M, 0, 2, 2)
    assert mimo_batch(x.to("meta"), y.to("meta"), M)[0].is_meta


def test_a_training_loop():
    """Members fit their own rows while the network sees others' too, and then agree on repeated inputs."""
    torch.manual_seed(0)  # about optimization, not about rounding
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    ensemble = ek.convert(model, "mimo", 2, keep_weights=False)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-2)
    for _ in range(100):
        inputs, targets = mimo_batch(x, y, 2, batch_repetition=2)
        optimizer.zero_grad()
        F.cross_entropy(ensemble(inputs, per_member=True).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    assert ((ensemble(x).argmax(-1) == y).float().mean(1) > 0.9).all()
    inputs, targets = mimo_batch(x, y, 2)
    assert ((ensemble(inputs, per_member=True).argmax(-1) == targets).float().mean(1) > 0.75).all()


# --------------------------------------------------------------------------------------------------- as an nn.Module


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies(how):
    def make() -> nn.Module:
        return ek.convert(ResNet(), "mimo", M)

    original = make().eval()
    x = torch.randn(M, B, 3, 6, 5)
    expected = original(x, per_member=True)
    if how == "state_dict":
        other = make().eval()
        other.load_state_dict(original.state_dict())
    else:
        other = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert torch.equal(other(x, per_member=True), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x, per_member=True), expected)
    assert list(original.model.state_dict()) == list(ResNet().state_dict())


def test_the_given_model_stays_as_it_is():
    model = ResNet().eval()
    model.stem.train()
    model.fc.weight.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    ensemble = ek.convert(model, "mimo", M)
    inner = ensemble.model
    assert (ensemble.training, inner.stem.training, inner.fc.training) == (False, True, False)
    assert (inner.fc.weight.requires_grad, inner.fc.bias.requires_grad) == (False, True)
    x = torch.randn(B, 3, 6, 5).to(memory_format=torch.channels_last)
    assert inner.stem(x.repeat(M, 1, 1, 1)).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = torch.get_rng_state()
    ensemble.member(1)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert ek.convert(ResNet(), "mimo", M).member(0).stem.weight.is_meta


def test_compiled():
    ensemble = ek.convert(mlp().double(), "mimo", M)
    compiled = torch.compile(copy.deepcopy(ensemble), fullgraph=True, backend="aot_eager")
    x = torch.randn(M, B, 6, **DOUBLE)
    results = []
    for module in (ensemble, compiled):
        y = module(x, per_member=True)
        results.append([y, *torch.autograd.grad(loss(y), list(module.parameters())), *module.buffers()])
    for actual, expected in zip(*results):
        close(actual, expected)
    close(compiled(x[0]), ensemble(x[0]))


def test_which_layers():
    def wide(model: nn.Module, **options: object) -> set[str]:
        plain = dict(model.named_modules())
        ensemble = ek.convert(model, "mimo", M, **options)
        return {path for path, m in ensemble.model.named_modules() if type(m) is not type(plain[path])}

    assert wide(ResNet()) == {"stem", "fc"}
    assert wide(ResNet(), first="layer1.conv2") == {"layer1.conv2", "fc"}
    assert wide(ResNet(), exclude="fc", last="layer2.1.conv2") == {"stem", "layer2.1.conv2"}
    assert wide(ResNet(), include=[nn.Conv2d]) == {"stem", "layer2.1.conv2"}
    assert wide(Tokens()) == {"embed", "head"}


def test_a_first_layer_behind_others():
    """They see the rows of all inputs."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.project, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.project(self.embed(x))).mean(1))

    ensemble = disturbed(ek.convert(Words().double(), "mimo", M, first="project"))
    inner, x = ensemble.model, torch.randint(9, (M, B, 5))
    h = torch.tanh(F.linear(torch.cat(inner.embed(x).unbind(), -1), inner.project.weight, inner.project.bias)).mean(1)
    y = F.linear(h, inner.head.weight, inner.head.bias)
    close(ensemble(x, per_member=True), torch.stack(y.chunk(M, 1)))


def test_summary():
    ensemble = ek.convert(mlp(), "mimo", M)
    summary = ensemble.summary()
    assert summary.rows == (("first layer", 8, 48), ("between", 56 + 14, 0), ("last layer", 0, 24))
    assert summary.total == ("all", 8 + 70, 72)
    assert sum(p.numel() for p in ensemble.parameters()) == 78 + M * 72
    assert summary.notes[0] == f"{78 + M * 72:,} parameters in all, {(78 + M * 72) / 150:.2f} times the plain model"
    pytest.importorskip("rich")
    assert "MIMO ensemble of 3 members" in str(summary)


# -------------------------------------------------------------------------------------------------------- bad input


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, forwards: bool = False) -> Tensor:
        layers = self.first, self.second
        for layer in layers[::-1] if forwards else layers:
            x = torch.tanh(layer(x))
        return x


class Round(nn.Module):
    """What comes into the first layer is used again before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.first(x))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def converted(model: nn.Module | None = None, **options: object) -> nn.Module:
    return ek.convert(mlp() if model is None else model, "mimo", **{"num_members": M, **options})


def batch(x: object = None, y: object = None, count: object = M, **options: object) -> object:
    x, y = torch.randn(4, 2) if x is None else x, torch.randn(4) if y is None else y
    return mimo_batch(x, y, count, **options)


GROUPED = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2))
BAD = {
    "one_layer": (
        lambda: converted(nn.Linear(3, 2)),
        ValueError,
        "model should be of a first and a last layer, got one",
    ),
    "none": (
        lambda: converted(nn.Tanh()),
        ValueError,
        "convert: model should be with layers to widen (Linear, Conv1d, C",
    ),
    "first_type": (
        lambda: converted(nn.Sequential(nn.LSTM(6, 6), nn.Linear(6, 2), nn.Linear(2, 2))),
        ValueError,
        "convert: first should be a Linear, Conv1d, Conv2d before all other modules with parameters, or named "
        "(first='path'), got LSTM at '0'",
    ),
    "last_type": (
        lambda: converted(nn.Sequential(mlp(), nn.BatchNorm1d(3))),
        ValueError,
        "convert: last should be a Linear, Conv1d, Conv2d after all other modules with parameters, or named "
        "(last='path'), got BatchNorm1d at '1'",
    ),
    "first": (
        lambda: converted(first="stem"),
        ValueError,
        "convert: first should be the path of a module in the model, g",
    ),
    "first_int": (
        lambda: converted(first=0),
        TypeError,
        "convert: first should be the path of a module in the model, got 0",
    ),
    "last": (
        lambda: converted(last="4"),
        ValueError,
        "convert: last should be the path of a Linear, Conv1d, Conv2d, got B",
    ),
    "groups": (
        lambda: converted(GROUPED),
        ValueError,
        "convert: first should be a layer of groups=1, got Conv2d at '0' of groups=2",
    ),
    "spread": (lambda: converted(spread=-0.1), ValueError, "convert: spread should be at least 0, got -0.1"),
    "tied": (lambda: converted(tied()), ValueError, "got weight of '1' tied to '0'"),
    "hooks": (lambda: converted(hooked()), ValueError, "without hooks on layers to be replaced, got Linear at '0'"),
    "members": (lambda: converted(num_members=0), ValueError, "convert: num_members should be at least 1, got 0"),
    "option": (
        lambda: converted(split="3"),
        TypeError,
        "convert: split should be an option of 'mimo': first, last, keep_w",
    ),
    "ensemble": (lambda: converted(converted()), ValueError, "convert: model should be plain, got MIMOEnsemble"),
    "backwards": (
        lambda: converted(Backwards())(torch.randn(M * B, 6)),
        ValueError,
        "MIMOEnsemble: first should be a layer that runs before the last (first= and last= name others), got one that",
    ),
    "round": (
        lambda: converted(Round())(torch.randn(1, 6)),
        ValueError,
        "MIMOEnsemble: the model's result should be [E*B, ...], one row for each of the input's",
    ),
    "first_is_last": (
        lambda: converted(last="0"),
        ValueError,
        "of a first and a last layer",
    ),
    "rows": (
        lambda: converted()(torch.randn(2, B, 6), per_member=True),
        ValueError,
        "MIMOEnsemble: input should be [E=3, B, ...] with per_member=True",
    ),
    "x": (lambda: batch([1.0]), TypeError, "mimo_batch: x should be a torch.Tensor, got list"),
    "x_axes": (lambda: batch(torch.tensor(1.0)), ValueError, "mimo_batch: x should be [B, ...], got float32[] on cpu"),
    "y": (
        lambda: batch(y=torch.zeros(3)),
        ValueError,
        "mimo_batch: y should be [B=4, ...] like x, got float32[3] on cpu",
    ),
    "count": (lambda: batch(count=0), ValueError, "mimo_batch: num_members should be at least 1, got 0"),
    "repeats": (
        lambda: batch(batch_repetition=1.0),
        TypeError,
        "mimo_batch: batch_repetition should be an int, got 1.0",
    ),
    "share": (
        lambda: batch(input_repetition=1.1),
        ValueError,
        "mimo_batch: input_repetition should be in [0, 1], got 1.1",
    ),
    "share_type": (
        lambda: batch(input_repetition="0"),
        TypeError,
        "mimo_batch: input_repetition should be a number, got",
    ),
    "generator": (
        lambda: batch(generator=3),
        TypeError,
        "mimo_batch: generator should be a torch.Generator, got int 3",
    ),
}


def test_the_order_is_that_of_each_pass():
    """A pass in the right order does not vouch for the next."""
    ensemble = converted(Backwards())
    x = torch.randn(M, M * B, 6)
    assert ensemble(x, True, per_member=True).shape == (M, M * B, 6)
    with pytest.raises(ValueError, match="MIMOEnsemble: first should be a layer that runs before the last"):
        ensemble(x, per_member=True)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)
