"""SWAG: statistics and samples against float64 as the paper writes them, moments, resumption."""

from __future__ import annotations

import io
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.ensembles import SWAG, swag

K = 4


class Network(nn.Module):
    """Convolution, tied weights, a frozen layer, a parameter without axes, one without elements, BatchNorm, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.randn(0, 3))
        self.register_buffer("constant", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))).mean((-1, -2))
        return self.scale * self.frozen(self.second(torch.tanh(self.first(h)))) + self.constant


def wandered(model: nn.Module, steps: int, spread: float = 0.3):
    """The model at each of several steps of a random walk; what is not trained changes too."""
    for _ in range(steps):
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                if t.is_floating_point():
                    t.add_(torch.randn(t.shape, dtype=torch.float64).to(t.dtype), alpha=spread)
        yield model


def collected(model: nn.Module, steps: int, **options) -> tuple[SWAG, list[dict[str, Tensor]]]:
    """And the parameters that were collected, in float64."""
    fitted, history = SWAG(model, **options), []
    for at in wandered(model, steps):
        fitted.collect(at)
        history.append({name: p.detach().double().clone() for name, p in at.named_parameters()})
    return fitted, history


def naive(history: list[Tensor], rank: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean, variance and the last deviations of one tensor, from the paper's running moments."""
    mean, square, deviations = torch.zeros_like(history[0]), torch.zeros_like(history[0]), []
    for n, theta in enumerate(history):
        mean = (n * mean + theta) / (n + 1)
        square = (n * square + theta**2) / (n + 1)
        deviations.append(theta - mean)
    return mean, (square - mean**2).clamp(min=0), deviations[-rank:] if rank else []


def in_turn(deviations: list[Tensor], collected: int) -> list[Tensor]:
    """As the ring has them, where the oldest make room."""
    first = collected % len(deviations)
    return deviations if first == 0 else deviations[-first:] + deviations[:-first]


def close(actual: Tensor, expected: Tensor, eps: float | None = None) -> None:
    eps = torch.finfo(actual.dtype).eps if eps is None else eps
    torch.testing.assert_close(actual.double(), expected, rtol=8 * eps, atol=8 * eps)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


# ------------------------------------------------------------------------------------------------- values of samples


@DTYPES
@pytest.mark.parametrize("steps", [1, 2, K, 2 * K + 1])
@pytest.mark.parametrize("rank", [K, 0])
def test_samples_are_those_of_the_equation(steps, rank, dtype, seed):
    """With the noise drawn as `sample` does: z2 for all tensors, then z1 of each."""
    model = Network().to(dtype)
    fitted, history = collected(model, steps, rank=rank)
    members, scale = 5, 0.7
    ensemble = fitted.sample(members, scale, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    columns = min(steps, rank) if min(steps, rank) > 1 else 0
    z2 = torch.randn(members, columns, generator=generator) if columns else None
    wide = torch.promote_types(dtype, torch.float32)
    for name, p in model.named_parameters():
        values = ensemble.get_parameter(name)
        assert values.dtype == dtype
        assert values.shape == (members, *p.shape)
        if not p.requires_grad:
            assert torch.equal(values, p.expand_as(values))
            continue
        mean, variance, deviations = naive([h[name] for h in history], rank)
        z1 = torch.randn(members, p.numel(), generator=generator, dtype=wide).view(members, *p.shape).double()
        expected = mean + scale * sqrt(0.5 if rank else 1.0) * variance.sqrt() * z1
        if columns:
            ring = torch.stack(in_turn(deviations, steps))
            expected = expected + scale * torch.tensordot(z2.double(), ring, 1) / sqrt(2 * (columns - 1))
        # float32 statistics: the variance's rounding is amplified where little is left of it
        close(values.detach(), expected, max(torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 1e-6))


@pytest.mark.parametrize("rank", [5, 0])
def test_moments_of_many_samples(rank):
    """Mean and covariance, also between tensors, within six standard errors."""
    model, members = nn.Linear(2, 2), 40_000
    fitted, history = collected(model, 8, rank=rank)
    thetas = [torch.cat([t.flatten() for t in h.values()]) for h in history]
    mean, variance, deviations = naive(thetas, rank)
    covariance = variance.diag()
    if rank:
        d = torch.stack(deviations, 1)
        covariance = 0.5 * covariance + d @ d.T / (2 * (rank - 1))
    ensemble = fitted.sample(members)
    samples = torch.cat([p.detach().double().flatten(1) for p in ensemble.parameters()], 1)
    diagonal = covariance.diag()
    assert ((samples.mean(0) - mean).abs() < 6 * (diagonal / members).sqrt()).all()
    error = ((diagonal.outer(diagonal) + covariance**2) / members).sqrt()
    assert ((samples.T.cov() - covariance).abs() < 6 * error).all()


@DTYPES
def test_scale_0_is_the_mean_exactly(dtype):
    model = Network().to(dtype).to(memory_format=torch.channels_last)
    fitted, history = collected(model, 7, rank=K)
    ensemble = fitted.sample(3, scale=0)
    for name, p in model.named_parameters():
        values = ensemble.get_parameter(name).detach()
        assert torch.equal(values, values[:1].expand_as(values))
        mean = naive([h[name] for h in history], K)[0] if p.requires_grad else history[-1][name]
        close(values[0], mean)
        if p.requires_grad:
            assert torch.equal(values[0], fitted.state_dict()["templates"][name][0].to(dtype))


def test_one_model_is_its_own_sample():
    model = Network()
    fitted, _ = collected(model, 1, rank=K, min_variance=0.0)
    ensemble = fitted.sample(4)
    for name, p in model.named_parameters():
        assert torch.equal(ensemble.get_parameter(name), p.expand(4, *p.shape))


def test_small_variance_is_not_lost_in_large_values():
    """The difference of the paper's moments has no digit of it in float32."""
    model = nn.Linear(30, 30).requires_grad_()
    with torch.no_grad():
        model.weight.fill_(1000.0)
    fitted, history = collected(model, 40, rank=0)
    exact = torch.stack([h["weight"] for h in history]).var(0, correction=0)
    torch.testing.assert_close(fitted.state_dict()["variance"]["weight"].double(), exact, rtol=1e-2, atol=0)


def test_min_variance():
    model = nn.Linear(100, 100)
    fitted, _ = collected(model, 1, rank=0, min_variance=4.0)
    spread = fitted.sample(50).weight.detach().std(0).mean()
    assert 1.9 < spread < 2.1


def test_tensors_are_written_once_where_they_stay(monkeypatch):
    """One call of the op for each, on the ensemble's own memory, with one z2."""
    calls = []
    op = swag.mix_with_noise_
    monkeypatch.setattr(swag, "mix_with_noise_", lambda *args: calls.append(args) or op(*args))
    model = Network().to(memory_format=torch.channels_last)
    fitted, _ = collected(model, K, rank=K)
    ensemble = fitted.sample(6)
    trained = {name: p for name, p in ensemble.named_parameters() if p.requires_grad}
    assert len(calls) == len(trained)
    for (noise, _, coefficients, templates), (name, p) in zip(calls, trained.items(), strict=True):
        assert noise.data_ptr() == p.data_ptr()
        assert templates.data_ptr() == fitted.state_dict()["templates"][name].data_ptr()
        assert torch.equal(coefficients, calls[0][2])
    assert ensemble.conv.weight[0].is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------- what comes of the model


def test_ensemble_is_like_its_members():
    model = Network()
    fitted, _ = collected(model, 3, rank=K)
    ensemble = fitted.sample(3)
    assert not any(m.training for m in ensemble.modules())
    assert model.training
    assert ensemble.first.weight is ensemble.second.weight
    assert [p.requires_grad for p in ensemble.parameters()] == [p.requires_grad for p in model.parameters()]
    for name, buffer in model.named_buffers():
        assert torch.equal(ensemble.get_buffer(name), buffer.expand(3, *buffer.shape))
    x = torch.randn(5, 2, 6, 6)
    members = ek.unstack(ensemble)
    torch.testing.assert_close(ensemble(x), torch.stack([m(x) for m in members]))
    ensemble(x).square().sum().backward()
    assert ensemble.conv.weight.grad.abs().sum() > 0


def test_buffers_are_those_last_collected():
    model = Network()
    fitted, _ = collected(model, 3, rank=K)
    before = model.constant.clone()
    next(wandered(model, 1))
    assert torch.equal(fitted.sample(2).constant, before.expand(2, 3))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["DP", "compile"])
def test_wrapped_models(wrap):
    model = Network()
    fitted, plain = SWAG(wrap(model), rank=K), SWAG(model, rank=K)
    for at in wandered(model, 3):
        fitted.collect(wrap(at))
        plain.collect(at)
    states = [f.state_dict()["templates"] for f in (fitted, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert list(states[0]) == list(states[1])


@pytest.mark.parametrize("steps", [0, 2, K + 2])
def test_a_resumed_run_has_the_same_bits(steps, seed):
    model = Network().bfloat16()
    whole, _ = collected(model, steps, rank=K)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = SWAG(Network().bfloat16(), rank=K)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for at in wandered(model, 3):
        whole.collect(at)
        resumed.collect(at)
    first, second = (f.sample(4, generator=torch.Generator().manual_seed(seed)) for f in (whole, resumed))
    second_state = second.state_dict()
    assert all(torch.equal(t, second_state[name]) for name, t in first.state_dict().items())
    assert torch.equal(first.constant, second.constant)
    assert repr(resumed) == f"SWAG(rank={K}, num_collected={steps + 3})"


def test_a_loaded_state_is_a_copy():
    model = Network()
    fitted, _ = collected(model, 2, rank=K)
    other = SWAG(model, rank=K)
    other.load_state_dict(fitted.state_dict())
    before = other.state_dict()["templates"]["conv.weight"].clone()
    fitted.collect(next(wandered(model, 1)))
    assert torch.equal(other.state_dict()["templates"]["conv.weight"], before)
    assert other.num_collected == 2


# ---------------------------------------------------------------------------------------------------------- bad input


def untrained() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def complex_weight() -> nn.Module:
    return nn.Linear(2, 2, dtype=torch.complex64)


BAD = {
    "model": (lambda: SWAG("model"), TypeError, "SWAG: model should be a torch.nn.Module, got str"),
    "rank_1": (lambda: SWAG(nn.Linear(2, 2), rank=1), ValueError, r"SWAG: rank should be 0 .* at least 2, got 1"),
    "rank_-1": (lambda: SWAG(nn.Linear(2, 2), rank=-1), ValueError, "SWAG: rank should be .*, got -1"),
    "rank_float": (lambda: SWAG(nn.Linear(2, 2), rank=2.0), TypeError, "SWAG: rank should be an int, got 2.0"),
    "min_variance": (lambda: SWAG(nn.Linear(2, 2), min_variance=-1.0), ValueError, "SWAG: min_variance should be"),
    "untrained": (
        lambda: SWAG(untrained()),
        ValueError,
        "SWAG: model should be with parameters that require gradients",
    ),
    "complex": (
        lambda: SWAG(complex_weight()),
        TypeError,
        "SWAG: parameter 'weight' should be float32, .* got complex64",
    ),
    "lazy": (lambda: SWAG(nn.LazyLinear(2)), ValueError, "should be initialized"),
    "nothing": (lambda: SWAG(nn.Linear(2, 2)).sample(2), ValueError, "SWAG: sample should be called after collect"),
    "members_0": (lambda: one().sample(0), ValueError, "SWAG.sample: num_members should be"),
    "members": (lambda: one().sample(2.0), TypeError, "SWAG.sample: num_members should be"),
    "scale": (lambda: one().sample(2, scale=-1.0), ValueError, "SWAG.sample: scale should be at least 0"),
    "scale_nan": (lambda: one().sample(2, scale=float("nan")), ValueError, "SWAG.sample: scale should be .*, got nan"),
    "scale_text": (lambda: one().sample(2, scale="1"), TypeError, "SWAG.sample: scale should be a number, got '1'"),
    "collect": (lambda: one().collect(3), TypeError, "SWAG.collect: model should be a torch.nn.Module, got int"),
    "shape": (
        lambda: one().collect(nn.Linear(3, 2)),
        ValueError,
        r"SWAG.collect: weight should be .*got float32\[2, 3\]",
    ),
    "dtype": (lambda: one().collect(nn.Linear(2, 2).double()), ValueError, "SWAG.collect: weight .* got float64"),
    "missing": (lambda: one().collect(nn.Linear(2, 2, bias=False)), ValueError, "SWAG.collect: bias .* no such tensor"),
    "more": (lambda: one().collect(nn.BatchNorm1d(2)), ValueError, "SWAG.collect: weight"),
    "frozen": (lambda: one().collect(untrained()), ValueError, "SWAG.collect: weight .* without requires_grad"),
    "state": (
        lambda: one().load_state_dict(SWAG(nn.Linear(2, 2), rank=3).state_dict()),
        ValueError,
        r"SWAG.load_state_dict: templates\['weight'\] should be \[21, 2, 2\]",
    ),
    "state_names": (
        lambda: one().load_state_dict(SWAG(nn.Linear(2, 2, bias=False)).state_dict()),
        ValueError,
        r"SWAG.load_state_dict: templates should be of the same tensors as here, got others: \['bias'\]",
    ),
}


def one() -> SWAG:
    model = nn.Linear(2, 2)
    fitted = SWAG(model)
    fitted.collect(model)
    return fitted


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words) as raised:
        call()
    assert ", got " in str(raised.value)


def test_a_refused_model_leaves_everything_as_it_was():
    fitted = one()
    before = {name: t.clone() for name, t in fitted.state_dict()["templates"].items()}
    with pytest.raises(ValueError, match="no such tensor"):
        fitted.collect(nn.Linear(2, 2, bias=False))
    assert fitted.num_collected == 1
    assert all(torch.equal(t, before[name]) for name, t in fitted.state_dict()["templates"].items())
