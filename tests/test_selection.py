"""Greedy selection against brute force, members taken with their optimizer, and early stopping member by member."""

from __future__ import annotations

import copy
import io
import re
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.ensembles import EarlyStopping, Selection, select_members, take_members

E = 5


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(y: Tensor, x: Tensor) -> Tensor:
    return (y - x[:, :3].sin()).square().mean((-1, -2))


# ----------------------------------------------------------------------------------------------------------- selection


def brute_force(losses: Tensor, num_members: int, replacement: bool) -> tuple[list[int], list[float]]:
    """Likelihoods added up as they are, candidate by candidate."""
    likelihoods = (-losses.double()).exp()
    members: list[int] = []
    found: list[float] = []
    while len(set(members)) < num_members:
        best, least = None, inf
        for j in range(len(losses)):
            if j in members and not replacement:
                continue
            loss = -likelihoods[[*members, j]].mean(0).log().mean().item()
            if loss < least:
                best, least = j, loss
        if best is None or (members and not least < found[-1] - 1e-11):
            break
        members.append(best)
        found.append(least)
    return members, found


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("candidates", "rows", "wanted"), [(12, 37, 4), (1, 3, 1), (6, 1, 6), (7, 200, 7)])
def test_selection_is_that_of_brute_force(candidates, rows, wanted, dtype, replacement):
    losses = (torch.randn(candidates, rows).double() * 2).square().to(dtype)
    members, found = brute_force(losses, wanted, replacement)
    chosen = select_members(losses.clone().requires_grad_(), wanted, replacement=replacement)
    assert chosen.members.tolist() == members
    assert not chosen.losses.requires_grad
    torch.testing.assert_close(chosen.losses, torch.tensor(found, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_likelihoods_that_underflow():
    """Constants of each row change losses, not the choice; exp(-5000) is 0."""
    losses = torch.rand(8, 20).double() * 3
    shift = torch.full((20,), 5000.0).double()
    plain, far = select_members(losses, 4), select_members(losses + shift, 4)
    assert plain.members.tolist() == far.members.tolist()
    torch.testing.assert_close(far.losses, plain.losses + 5000.0, rtol=1e-12, atol=0)


def test_one_that_repeats_is_chosen_again_and_counts():
    likelihoods = torch.tensor([[0.9, 0.9, 0.9, 0.01], [0.3, 0.3, 0.3, 0.95], [0.01, 0.01, 0.01, 0.01]])
    chosen = select_members(-likelihoods.log(), 3)
    assert chosen.members.tolist() == brute_force(-likelihoods.log(), 3, True)[0]
    assert chosen.unique.tolist() == [0, 1]
    assert chosen.members.tolist().count(0) > 1
    counts = torch.bincount(chosen.members)[:2]
    torch.testing.assert_close(chosen.weights, counts / counts.sum())


def test_equal_candidates_and_nan():
    rows = torch.rand(1, 9)
    assert select_members(rows.expand(4, 9), 3).members.tolist() == [0]  # a second lowers nothing
    losses = torch.rand(4, 9)
    losses[0, 3] = nan
    losses[2] = losses[1]
    assert 0 not in select_members(losses, 4).members.tolist()
    assert select_members(losses[[0, 0]], 2).members.tolist() == [0]
    assert select_members(losses[[0, 0]], 2).losses.tolist() == [inf]


def test_a_row_that_a_member_excludes():
    """An infinite loss of the first is told as such, and another member makes it finite."""
    losses = torch.tensor([[0.1, inf], [inf, 0.2]])
    chosen = select_members(losses, 2)
    assert chosen.members.tolist() == [0, 1]
    assert chosen.losses[0] == inf
    expected = -(torch.tensor([0.1, 0.2]).double().neg().exp() / 2).log().mean()
    torch.testing.assert_close(chosen.losses[1], expected)


BAD_SELECTION = {
    "a list": (([[1.0]], 1), TypeError, "losses should be a torch.Tensor"),
    "integers": ((torch.ones(2, 3, dtype=torch.long), 1), TypeError, "losses should be a float32"),
    "one axis": ((torch.ones(3), 1), ValueError, "losses should be [M, B]"),
    "no rows": ((torch.ones(3, 0), 1), ValueError, "losses should be [M, B]"),
    "a float": ((torch.ones(3, 2), 1.0), TypeError, "num_members should be an int, got 1.0"),
    "a bool": ((torch.ones(3, 2), True), TypeError, "num_members should be an int, got True"),
    "none": ((torch.ones(3, 2), 0), ValueError, "num_members should be 1 to M=3, got 0"),
    "too many": ((torch.ones(3, 2), 4), ValueError, "num_members should be 1 to M=3, got 4"),
}


@pytest.mark.parametrize("name", BAD_SELECTION)
def test_bad_selection(name):
    arguments, error, said = BAD_SELECTION[name]
    with pytest.raises(error, match=re.escape(f"select_members: {said}")):
        select_members(*arguments)


def test_weights_of_a_selection():
    assert Selection(torch.tensor([4, 1, 4, 4]), torch.zeros(4)).weights.tolist() == [0.25, 0.75]


# ------------------------------------------------------------------------------------------------------ taking members

LR, DECAY = [0.1, 0.02, 0.03, 0.05, 0.01], [0.0, 0.1, 0.2, 0.3, 0.4]
OPTIMIZERS = {
    "torch sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "torch adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}),
    "sgd": (ek.optim.EnsembleSGD, {"lr": LR, "momentum": [0.9, 0.5, 0.0, 0.3, 0.2], "weight_decay": DECAY}),
    "adamw": (
        ek.optim.EnsembleAdamW,
        {"lr": LR, "betas": ([0.9, 0.8, 0.5, 0.3, 0.2], 0.99), "weight_decay": torch.tensor(DECAY), "eps": 1e-3},
    ),
}


def train(ensemble: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        loss_of(ensemble(x), x).sum().backward()
        optimizer.step()


def make(name: str, members: list[nn.Module], chosen: list[int] | range) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two groups, with names."""
    ensemble = ek.stack(members)
    kind, options = OPTIMIZERS[name]
    if kind.__module__.startswith("effens"):
        options = {key: pick(value, chosen) for key, value in options.items()}
    named = list(ensemble.named_parameters())
    return ensemble, kind([{"params": named[:2]}, {"params": named[2:]}], **options)


def pick(value: object, chosen: list[int] | range) -> object:
    if isinstance(value, tuple):
        return tuple(pick(part, chosen) for part in value)
    if isinstance(value, Tensor):
        return value[list(chosen)]
    return [value[e] for e in chosen] if isinstance(value, list) else value


@pytest.mark.parametrize("chosen", [[3, 0], [2], torch.tensor([False, True, False, True, True])], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_taken_train_as_alone(name, chosen):
    """As an ensemble that never had the others."""
    models = [network() for _ in range(E)]
    before, after = ([torch.randn(8, 4).double() for _ in range(3)] for _ in range(2))
    indices = chosen if isinstance(chosen, list) else [1, 3, 4]
    ensemble, optimizer = make(name, models, range(E))
    alone, optimizer_alone = make(name, [models[e] for e in indices], indices)
    train(alone, optimizer_alone, before)
    train(ensemble, optimizer, before)
    taken = take_members(ensemble, chosen, optimizer)
    kept = copy.deepcopy(ensemble.state_dict())
    train(taken, optimizer, after)
    train(alone, optimizer_alone, after)
    for path, value in alone.state_dict().items():
        torch.testing.assert_close(taken.state_dict()[path], value, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, kept[path]) for path, value in ensemble.state_dict().items())
    again = make(name, ek.unstack(taken), indices)[1]
    again.load_state_dict(optimizer.state_dict())


def test_what_is_added_later_has_hyperparameters_of_those_taken():
    ensemble, optimizer = make("adamw", [network() for _ in range(E)], range(E))
    optimizer.active = [True, False, True, False, True]
    take_members(ensemble, [4, 3], optimizer)
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2, 3)))]})
    for group in optimizer.param_groups:
        assert group["lr"].tolist() == [LR[4], LR[3]]
        assert group["betas"][0].tolist() == [0.2, 0.3]
    assert optimizer.active.tolist() == [True, False]


def test_modes_and_order_are_kept():
    ensemble = ek.stack([network() for _ in range(E)], randomness="same")
    ensemble.get_submodule("1").eval()
    ensemble.get_submodule("0").weight.requires_grad_(False)
    taken = take_members(ensemble, [-1, 2, 2])
    assert taken.randomness == "same"
    assert [m.training for m in taken.modules()] == [m.training for m in ensemble.modules()]
    assert [p.requires_grad for p in taken.parameters()] == [p.requires_grad for p in ensemble.parameters()]
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(taken(x), ensemble(x)[[4, 2, 2]])


def trained_by(kind: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    ensemble = ek.stack([network() for _ in range(E)])
    optimizer = kind(ensemble.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ensemble(torch.ones(2, 4).double()).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ensemble, optimizer


BAD_TAKING = {
    "a model": (lambda e: take_members(network(), [0]), TypeError, "ensemble should be a StackedEnsemble"),
    "floats": (lambda e: take_members(e, [0.0]), TypeError, "members should be bool [E=5] or indices"),
    "mixed": (lambda e: take_members(e, [0, True]), TypeError, "members should be bool [E=5] or indices"),
    "a number": (lambda e: take_members(e, 3), TypeError, "members should be bool [E=5] or indices"),
    "no axis": (lambda e: take_members(e, torch.tensor(3)), TypeError, "members should be bool [E=5] or indices"),
    "two axes": (lambda e: take_members(e, torch.ones(1, 5) > 0), TypeError, "members should be bool [E=5]"),
    "bools": (lambda e: take_members(e, [True] * 4), ValueError, "members should be bool [E=5] or indices, got 4"),
    "none": (lambda e: take_members(e, torch.zeros(5) > 0), ValueError, "members should be at least one"),
    "range": (lambda e: take_members(e, [0, 5]), ValueError, "members should be in [-5, 5), got 5"),
    "optimizer": (lambda e: take_members(e, [0], 3), TypeError, "optimizer should be None or a torch.optim.Optimizer"),
    "another's": (
        lambda e: take_members(e, [0], trained_by(torch.optim.SGD)[1]),
        ValueError,
        "optimizer should be of this ensemble's parameters",
    ),
    "shared": (
        lambda e: take_members(ek.convert(network(), "sub_ensemble", 3, split="3").model, [0]),
        ValueError,
        "ensemble should be one whose members share nothing",
    ),
}


@pytest.mark.parametrize("name", BAD_TAKING)
def test_bad_taking(name):
    call, error, said = BAD_TAKING[name]
    with pytest.raises(error, match=re.escape(f"take_members: {said}")):
        call(ek.stack([network() for _ in range(E)]))


def test_states_of_all_members_together_are_refused():
    ensemble, optimizer = trained_by(torch.optim.LBFGS)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"optimizer's state '\w+' should be \[E=5, ...\], got \w+$"):
        take_members(ensemble, [0], optimizer)
    assert optimizer.state_dict()["state"].keys() == before["state"].keys()


# ------------------------------------------------------------------------------------------------------ early stopping


class Loop:
    """One member: copies of its best values."""

    def __init__(self, model: nn.Module, patience: int, min_delta: float) -> None:
        self.best, self.waited, self.patience, self.min_delta = inf, 0, patience, min_delta
        self.values = copy.deepcopy(model.state_dict())

    def step(self, model: nn.Module, loss: float) -> bool:
        if self.waited < self.patience:
            if loss < self.best - self.min_delta:
                self.best, self.waited, self.values = loss, 0, copy.deepcopy(model.state_dict())
            else:
                self.waited += 1
        return self.waited < self.patience


def change(ensemble: nn.Module) -> None:
    with torch.no_grad():
        for t in (*ensemble.parameters(), *ensemble.buffers()):
            t.copy_(torch.randint_like(t, 99) if not t.is_floating_point() else torch.randn_like(t))


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 0.0), (3, 0.3)])
def test_stopping_is_that_of_a_loop(patience, min_delta):
    ensemble = ek.stack([network() for _ in range(E)])
    stopping = EarlyStopping(ensemble, patience=patience, min_delta=min_delta)
    loops = [Loop(model, patience, min_delta) for model in ek.unstack(ensemble)]
    losses = torch.rand(12, E).double()
    losses[3, 1], losses[:, 2], losses[:, 0] = inf, nan, torch.linspace(9, 1, 12)
    for epoch, row in enumerate(losses):
        if epoch == 5:  # a run that is interrupted
            file = io.BytesIO()
            torch.save(stopping.state_dict(), file)
            file.seek(0)
            stopping = EarlyStopping(ensemble, patience=patience, min_delta=min_delta)
            stopping.load_state_dict(torch.load(file, weights_only=True))
        change(ensemble)
        active = stopping.step(row if epoch % 2 else row.tolist())
        members = ek.unstack(ensemble)
        expected = [loop.step(model, loss) for loop, model, loss in zip(loops, members, row.tolist())]
        assert active.tolist() == stopping.active.tolist() == expected
        assert stopping.best.tolist() == [loop.best for loop in loops]
    assert expected[0]
    assert not expected[2]
    stopping.restore()
    for loop, model in zip(loops, ek.unstack(ensemble)):
        assert all(torch.equal(value, loop.values[path]) for path, value in model.state_dict().items())


def test_an_optimizer_leaves_what_has_stopped():
    ensemble, optimizer = make("adamw", [network() for _ in range(E)], range(E))
    stopping = EarlyStopping(ensemble, patience=1)
    train(ensemble, optimizer, [torch.randn(8, 4).double()])
    stopping.step([1.0] * E)
    optimizer.active = stopping.step([0.5, 2.0, 0.5, 0.5, nan])
    before = [p.detach().clone() for p in ensemble.parameters()]
    train(ensemble, optimizer, [torch.randn(8, 4).double()])
    changed = torch.stack([(p != q).flatten(1).any(1) for p, q in zip(ensemble.parameters(), before)]).any(0)
    assert changed.tolist() == [True, False, True, True, False]


def test_an_ensemble_that_moves():
    ensemble = ek.stack([nn.Linear(3, 2) for _ in range(2)])
    stopping = EarlyStopping(ensemble)
    ensemble.double()
    change(ensemble)
    stopping.step([1.0, 2.0])
    expected = ensemble.weight.detach().float()
    change(ensemble)
    stopping.restore()
    assert ensemble.weight.dtype == torch.float64
    assert torch.equal(ensemble.weight.float(), expected)


BAD_STOPPING = {
    "a number": (lambda e: EarlyStopping(3), TypeError, "ensemble should be a torch.nn.Module"),
    "a model": (lambda e: EarlyStopping(network()), TypeError, "num_members should be an int, got None"),
    "another": (
        lambda e: EarlyStopping(network(), 3),
        ValueError,
        "ensemble should be of tensors [E=3, ...], got 0.we",
    ),
    "patience": (lambda e: EarlyStopping(e, patience=0), ValueError, "patience should be at least 1, got 0"),
    "patience type": (lambda e: EarlyStopping(e, patience=1.5), TypeError, "patience should be an int, got 1.5"),
    "delta": (lambda e: EarlyStopping(e, min_delta=-1.0), ValueError, "min_delta should be at least 0, got -1.0"),
    "delta nan": (lambda e: EarlyStopping(e, min_delta=nan), ValueError, "min_delta should be at least 0, got nan"),
    "delta type": (lambda e: EarlyStopping(e, min_delta="1"), TypeError, "min_delta should be a number"),
    "losses": (lambda e: EarlyStopping(e).step([1.0]), ValueError, "losses should be [E=5], got float64[1]"),
    "state": (
        lambda e: EarlyStopping(e).load_state_dict(EarlyStopping(take_members(e, [0])).state_dict()),
        ValueError,
        "state should be of this ensemble, got of another",
    ),
    "shared": (
        lambda e: EarlyStopping(ek.convert(network(), "sub_ensemble", 3, split="3").model),
        ValueError,
        "ensemble should be one whose members share nothing",
    ),
}


@pytest.mark.parametrize("name", BAD_STOPPING)
def test_bad_stopping(name):
    call, error, said = BAD_STOPPING[name]
    with pytest.raises(error, match=re.escape(f"EarlyStopping: {said}")):
        call(ek.stack([network() for _ in range(E)]))
