"""Masksembles by ek.convert: the masks' counts and overlaps, values behind them, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.ensembles.masksembles import MemberMask, draw_masks

E, B = 4, 3


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 3.3, 6.0])
@pytest.mark.parametrize(("members", "channels"), [(1, 7), (2, 1), (2, 10), (4, 64), (5, 3), (8, 257)])
def test_masks_keep_as_many_each_and_every_channel(members, channels, scale):
    masks = draw_masks(members, channels, scale)
    assert masks.shape == (members, channels)
    assert ((masks == 0) | (masks == 1)).all()
    kept = masks.sum(1)
    assert (kept == kept[0]).all()
    assert masks.any(0).all()
    if scale == 1.0 or members == 1:
        assert masks.all()


def test_overlap_of_masks_is_the_papers():
    """Two of M ones among S M positions share M / S of them; six standard errors of the hypergeometric mean."""
    for scale in (2.0, 4.0):
        pairs = []
        for _ in range(60):
            masks = draw_masks(4, 200, scale)
            kept = float(masks[0].sum())
            shared = masks @ masks.T
            pairs.append(float(shared.sum() - shared.trace()) / 12 / kept)
        pairs = torch.tensor(pairs)
        assert (pairs.mean() - 1 / scale).abs() < 6 * pairs.std() / 60**0.5 + 0.02


def test_masks_are_drawn_by_the_generator(seed):
    first, second = (draw_masks(4, 30, 2.0, torch.Generator().manual_seed(seed + 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw_masks(4, 30, 2.0))


class Network(nn.Module):
    """Channels of images, of tokens and of rows; a dropout that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.maps = nn.Conv2d(2, 12, 3), nn.Dropout2d()
        self.norm = nn.BatchNorm2d(12)
        self.tokens, self.linear, self.drop = nn.Dropout(), nn.Linear(12, 10), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.maps(self.conv(x))))
        h = self.tokens(h.flatten(2).transpose(1, 2)).mean(1)
        return self.drop(self.drop(torch.tanh(self.linear(h))) + 1)


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_members_compute_what_their_masks_keep(per_member, training):
    model = Network().double()
    x = torch.randn(*([E] if per_member else []), B, 2, 5, 5, dtype=torch.float64)
    ensemble = ek.convert(model, "masksembles", E, example=x[0] if per_member else x, scale=2.0).train(training)
    masks = {name: m.masks for name, m in ensemble.model.named_modules() if isinstance(m, MemberMask)}
    assert {name: list(m.shape) for name, m in masks.items()} == {"maps": [E, 12], "tokens": [E, 12], "drop": [E, 10]}
    y = ensemble(x, per_member=per_member)
    rows = torch.stack([x[e] if per_member else x for e in range(E)])

    h = model.conv(rows.flatten(0, 1)).unflatten(0, (E, B)) * masks["maps"][:, None, :, None, None]
    h = torch.tanh(model.norm.train(training)(h.flatten(0, 1))).unflatten(0, (E, B))  # of the rows of all members
    h = (h.flatten(3).transpose(2, 3) * masks["tokens"][:, None, None]).mean(2)
    m = masks["drop"][:, None]
    expected = (torch.tanh(model.linear(h)) * m + 1) * m
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    if not training:
        for e in (0, -1):
            alone = ensemble.member(e)
            torch.testing.assert_close(alone(rows[e]), y[e], rtol=1e-9, atol=1e-9)
    (y * y).sum().backward()
    (expected * expected).sum().backward()
    for ours, theirs in zip(ensemble.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_masks_stay_and_are_saved():
    model = nn.Sequential(nn.Linear(6, 20), nn.Dropout(), nn.Linear(20, 3))
    x = torch.randn(B, 6)
    first, second = (ek.convert(model, "masksembles", E, example=x) for _ in range(2))
    assert torch.equal(first(x), first.eval()(x))
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), second(x))
    assert first(x[:0]).shape == (E, 0, 3)
    assert "each keeps" in first.summary().notes[0]


def test_the_model_stays_as_it_is():
    model = Network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ensemble = ek.convert(model, "masksembles", E, example=(torch.randn(B, 2, 5, 5),), exclude="drop")
    assert isinstance(ensemble.model.drop, nn.Dropout)
    assert isinstance(model.maps, nn.Dropout2d)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *ensemble.modules()))


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return x


ROWS = torch.zeros(B, 6)
BAD = {
    "no_example": (nn.Dropout(), {}, TypeError, "convert: example should be"),
    "scale": (nn.Dropout(), {"example": ROWS, "scale": 0.5}, ValueError, "convert: scale should be at least 1"),
    "scale_inf": (nn.Dropout(), {"example": ROWS, "scale": float("inf")}, ValueError, r"scale should be .* got inf"),
    "scale_text": (nn.Dropout(), {"example": ROWS, "scale": "2"}, TypeError, "convert: scale should be a number"),
    "without": (nn.Linear(6, 6), {"example": ROWS}, ValueError, "convert: model should be with dropout layers"),
    "unreached": (Unreached(), {"example": ROWS}, ValueError, "example should be one that reaches .* 'drop'"),
    "no_rows": (nn.Dropout(), {"example": ROWS[0]}, ValueError, "convert: example should be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    model, options, error, words = BAD[name]
    with pytest.raises(error, match=words) as raised:
        ek.convert(model, "masksembles", E, **options)
    assert ", got " in str(raised.value)


def test_rows_that_do_not_fit_the_masks():
    with pytest.raises(ValueError, match=r"MemberMask: input should be .* E=2 members and C=2 channels, got"):
        MemberMask(torch.eye(2), 1)(torch.ones(3, 2))
