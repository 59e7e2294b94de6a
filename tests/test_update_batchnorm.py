"""update_batchnorm: statistics of all members in one pass, against PyTorch's of each member alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import effens_kernels as ek
from effens_kernels.ensembles import SWAG, update_batchnorm


@torch.no_grad()
def wander(model: nn.Module) -> None:
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)


class Norms(nn.Module):
    """Of each kind; one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.images = nn.BatchNorm2d(4, momentum=0.3)
        self.linear = nn.Linear(4, 5)
        self.twice = nn.BatchNorm1d(5)
        self.cumulative = nn.BatchNorm1d(5, momentum=None, affine=False)
        self.current = nn.BatchNorm1d(5, track_running_stats=False)
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.images(self.conv(x))).mean((-1, -2))
        h = self.twice(torch.tanh(self.twice(self.linear(h))))
        return self.current(h) if self.cumulative is None else self.cumulative(self.current(self.drop(h)))


def norms(device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Dropout switched off, so that members and models of a loop see the same."""
    model = Norms().to(device, dtype)
    model.drop.p = 0.0
    return model


BATCHES = {
    "tensors": lambda: [torch.randn(b, 2, 5, 5, dtype=torch.float64) for b in (7, 3, 8)],
    "pairs": lambda: [(torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.zeros(6)) for _ in range(2)],
    "lists": lambda: [[torch.randn(4, 2, 5, 5, dtype=torch.float64), "label"]],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_statistics_of_all_members_in_one_pass(kind, monkeypatch):
    """Equal to PyTorch's own for each member alone; one call of the ensemble for each batch."""
    ensemble = ek.stack([norms() for _ in range(3)])
    wander(ensemble)
    members, batches, calls = ek.unstack(ensemble), BATCHES[kind](), []
    forward = ek.ensembles.StackedEnsemble.forward
    monkeypatch.setattr(
        ek.ensembles.StackedEnsemble, "forward", lambda self, *x, **k: calls.append(1) or forward(self, *x, **k)
    )
    update_batchnorm(ensemble, iter(batches))
    assert len(calls) == len(batches)
    for member in members:
        update_bn(batches, member)
    for name, buffer in ensemble.named_buffers():
        expected = torch.stack([m.get_buffer(name) for m in members])
        torch.testing.assert_close(buffer, expected, rtol=1e-9, atol=1e-9)
    assert ensemble.twice.num_batches_tracked.tolist() == [2 * len(batches)] * 3
    x = torch.randn(5, 2, 5, 5, dtype=torch.float64)
    ensemble.eval()
    torch.testing.assert_close(ensemble(x), torch.stack([m.eval()(x) for m in members]), rtol=1e-9, atol=1e-9)


def test_samples_of_weights_get_statistics_of_their_own():
    model = norms()
    fitted = SWAG(model)
    for _ in range(3):
        wander(model)
        fitted.collect(model)
    ensemble, batches = fitted.sample(4), BATCHES["tensors"]()
    update_batchnorm(ensemble, batches)
    members = ek.unstack(ensemble)
    for member in members:
        update_bn(batches, member)
    assert not ensemble.training
    for name, buffer in ensemble.named_buffers():
        torch.testing.assert_close(buffer, torch.stack([m.get_buffer(name) for m in members]), rtol=1e-9, atol=1e-9)


def modes(ensemble: nn.Module) -> list:
    plain = [vars(part)["_plain"] for part in ensemble.modules()]
    return [
        *((m.training, p.training) for m, p in zip(ensemble.modules(), plain)),
        *(getattr(p, "momentum", 0) for p in plain),
        *(len(p._forward_pre_hooks) for p in plain),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_momenta_are_as_before(fails):
    ensemble = ek.stack([norms() for _ in range(2)])
    ensemble.conv.eval()
    before = modes(ensemble)
    batches = BATCHES["tensors"]()
    if fails:
        batches.append(torch.randn(3, 7, 5, 5, dtype=torch.float64))
        with pytest.raises(RuntimeError):
            update_batchnorm(ensemble, batches)
    else:
        update_batchnorm(ensemble, batches)
    assert modes(ensemble) == before
    assert ensemble.twice.weight.grad is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_converted_ensembles_and_plain_modules(wrapped):
    """EnsembleBatchNorm and torch.nn's."""
    layers = [m for _ in range(3) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6))]
    ensemble = ek.convert(nn.Sequential(*layers), "mixture", num_members=3, budget="2x").double()
    batches = [torch.randn(b, 6, dtype=torch.float64) for b in (5, 9)]
    members = [ensemble.member(e) for e in range(3)]
    update_batchnorm(nn.DataParallel(ensemble) if wrapped else ensemble, batches)
    for e, member in enumerate(members):
        again = ensemble.member(e)
        update_bn(batches, member)
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(again.get_buffer(name), buffer, rtol=1e-9, atol=1e-9)
    plain = members[0]
    wander(plain)
    update_batchnorm(plain, batches)
    expected = {name: buffer.clone() for name, buffer in plain.named_buffers()}
    update_bn(batches, plain)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in plain.named_buffers())


def test_a_model_without_batchnorm_does_not_run():
    update_batchnorm(ek.stack([nn.Linear(3, 3)]), itertools.repeat(None))


def test_something_else_than_a_module():
    with pytest.raises(TypeError, match=r"update_batchnorm: ensemble should be a torch.nn.Module, got list"):
        update_batchnorm([1], [])


def test_no_batch_leaves_statistics_as_they_were():
    model = nn.BatchNorm1d(3)
    model(torch.randn(5, 3))
    before = model.running_mean.clone()
    with pytest.raises(ValueError, match="an empty one"):
        update_batchnorm(model, [])
    assert torch.equal(model.running_mean, before)
