"""MC dropout by ek.convert: values behind the masks that were drawn, moments, what runs once, modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._C import _functorch

import effens_kernels as ek
from effens_kernels.ensembles import MCDropoutEnsemble

E, B = 5, 4


class Seen(nn.Module):
    """Notes whether each call is of one tensor for all members."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shared.append(not _functorch.is_batchedtensor(x))
        return x


class Network(nn.Module):
    """Returns what each dropout made, and what came of it; a way around it, a second output that does not see it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.before, self.after = Seen(), Seen()
        self.maps = nn.Dropout2d(0.4, inplace=inplace)
        self.linear = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5, inplace=inplace)
        self.tail = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(1), nn.Linear(12, 3))

    def head(self, x: Tensor) -> Tensor:
        return self.before(torch.tanh(self.norm(self.conv(x))))

    def middle(self, h: Tensor, dropped: Tensor) -> Tensor:
        return torch.tanh(self.linear((h + dropped).mean((-1, -2))))

    def forward(self, x: Tensor) -> dict[str, object]:
        h = self.head(x)
        dropped = self.maps(h.clone())
        m = self.middle(h, dropped)
        again = self.drop(m.clone())
        return {"maps": dropped, "drop": again, "y": (self.after(self.tail(again.unsqueeze(1))), h.sum()), "n": 3}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("per_member", [False, True])
def test_members_compute_what_their_masks_leave(per_member, inplace):
    model = Network(inplace).double().eval()
    for norm in (model.norm, model.tail[1]):
        norm.running_mean.normal_()
    ensemble = ek.convert(model, "mc_dropout", E)
    x = torch.randn(*([E] if per_member else []), B, 2, 5, 5, dtype=torch.float64)
    result = ensemble(x, per_member=per_member)
    assert list(result) == ["maps", "drop", "y", "n"]
    assert result["n"] == 3
    for e in range(E):
        h = model.head(x[e] if per_member else x)
        kept = result["maps"][e] != 0
        close(result["maps"][e], torch.where(kept, h / 0.6, torch.zeros_like(h)))
        assert torch.equal(kept, kept[..., :1, :1].expand_as(kept))  # whole maps
        m = model.middle(h, result["maps"][e])
        kept = result["drop"][e] != 0
        close(result["drop"][e], torch.where(kept, m / 0.5, torch.zeros_like(m)))
        close(result["y"][0][e], model.tail(result["drop"][e].unsqueeze(1)))
        close(result["y"][1][e], h.sum())
    masks = result["drop"] != 0
    assert not all(torch.equal(masks[0], mask) for mask in masks[1:])
    assert not torch.equal(ensemble(x, per_member=per_member)["drop"] != 0, masks)
    assert model.maps.inplace is inplace


def test_what_comes_before_dropout_runs_once():
    ensemble = ek.convert(Network(), "mc_dropout", E).eval()
    ensemble(torch.randn(B, 2, 5, 5))
    assert ensemble.model.before.shared == [True]
    assert ensemble.model.after.shared == [False]


def test_moments():
    """Of a linear layer on dropped inputs, within six standard errors."""
    p, members = 0.3, 20_000
    model = nn.Sequential(nn.Dropout(p), nn.Linear(7, 3)).double()
    x = torch.randn(1, 7, dtype=torch.float64)
    y = ek.convert(model, "mc_dropout", members).eval()(x)[:, 0].detach()
    terms = (model[1].weight * x).detach()
    variance = (terms**2).sum(1) * p / (1 - p)
    mean = terms.sum(1) + model[1].bias.detach()
    assert ((y.mean(0) - mean).abs() < 6 * (variance / members).sqrt()).all()
    fourth = ((y - mean) ** 4).mean(0)
    assert ((y.var(0) - variance).abs() < 6 * (fourth / members).sqrt()).all()


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(self.first(x))
        return h, self.second(h)


def test_gradients_are_those_behind_the_masks():
    """Of parameters that all members share."""
    model = Dropped().double()
    ensemble = ek.convert(model, "mc_dropout", E)
    x, weights = torch.randn(B, 6, dtype=torch.float64), torch.randn(E, B, 3, dtype=torch.float64)
    h, y = ensemble(x)
    (y * weights).sum().backward()
    scales = 2.0 * (h.detach() != 0)
    sum((model.second(scale * model.first(x)) * weight).sum() for scale, weight in zip(scales, weights)).backward()
    for ours, theirs in zip(ensemble.parameters(), model.parameters(), strict=True):
        close(ours.grad, theirs.grad)


def test_modes_and_choices():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    ensemble = ek.convert(model, "mc_dropout", E, exclude="3").eval()
    assert [m.training for m in ensemble.model] == [True, False, False, False]
    assert [m.training for m in ensemble.train().model] == [True] * 4
    assert [m.training for m in model] == [True] * 4
    assert ek.convert(model, "mc_dropout", E, include="3").active == ["3"]
    twice = nn.Sequential(model[0], model[1], model[0])
    assert ek.convert(twice, "mc_dropout", E).active == ["0"]
    assert ek.convert(model.eval(), "mc_dropout", E).model[3].training


def test_no_dropout_left_makes_equal_members():
    model = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4)).double()
    ensemble, x = ek.convert(model, "mc_dropout", E).eval(), torch.randn(B, 4, dtype=torch.float64)
    close(ensemble(x), model(x).expand(E, B, 4))
    assert ensemble(x[:0]).shape == (E, 0, 4)


def test_a_member_is_the_model_with_dropout_on():
    ensemble = ek.convert(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)), "mc_dropout", E).eval()
    member = ensemble.member(-1)
    assert type(member) is nn.Sequential
    assert member[0].training
    assert member[1].weight is not ensemble.model[1].weight
    assert torch.equal(member[1].weight, ensemble.model[1].weight)
    with pytest.raises(IndexError, match="MCDropoutEnsemble: member should be in"):
        ensemble.member(E)


def test_state_and_summary():
    model = Network()
    ensemble = ek.convert(model, "mc_dropout", E)
    assert isinstance(ensemble, MCDropoutEnsemble)
    assert [f"model.{name}" for name in model.state_dict()] == list(ensemble.state_dict())
    count = sum(p.numel() for p in model.parameters())
    assert ensemble.summary().total == ("all", count, 0)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.drop(self.linear(x)).sum() > 0 else -x


def test_code_that_goes_where_values_lead_is_refused_by_name():
    ensemble = ek.convert(Branches(), "mc_dropout", E)
    with pytest.raises(RuntimeError, match=r"mc_dropout: the model's forward \(Branches\) cannot run"):
        ensemble(torch.randn(B, 3))


BAD = {
    "without": (
        lambda: ek.convert(nn.Linear(3, 3), "mc_dropout", E),
        ValueError,
        "convert: model should be with dropout",
    ),
    "option": (lambda: ek.convert(nn.Dropout(), "mc_dropout", E, p=0.5), TypeError, "convert: p should be an option"),
    "members": (lambda: ek.convert(nn.Dropout(), "mc_dropout", 0), ValueError, "convert: num_members should be"),
    "rows": (
        lambda: ek.convert(nn.Dropout(), "mc_dropout", E)(torch.zeros(E + 1, B, 3), per_member=True),
        ValueError,
        r"MCDropoutEnsemble: input should be \[E=5, B, ...\] with per_member=True",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words) as raised:
        call()
    assert ", got " in str(raised.value)
