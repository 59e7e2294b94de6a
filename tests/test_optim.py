"""EnsembleSGD and EnsembleAdamW: the values of E separate optimizers of PyTorch, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import RUNNERS, Runner, runs
from optim_cases import (
    EVERYTHING,
    LAYOUTS,
    LR,
    MEMBERS,
    OPTIONS,
    OURS,
    SHAPES,
    THEIRS,
    Separate,
    assert_equal,
    build,
    kind_of,
    laid_out,
    own,
    random_grads,
    step,
    values,
)
from torch import nn

import effens_kernels as ek
from effens_kernels.ops.optimizer_step import native

STEPS = 5
HAVE_STEPS = [r for r in RUNNERS if r.dtypes("sgd_step")]


def check_against_separate(name, shapes, dtype, device="cpu", backend=None, layout="contiguous", grads=None) -> None:
    """STEPS steps on random gradients against float64 optimizers of PyTorch, and those of the same dtype."""
    start = values(shapes, dtype, device)
    params = [nn.Parameter(laid_out(t, layout)) for t in start]
    optimizer = build(name, params, backend)
    exact, plain = (Separate(kind_of(name), OPTIONS[name], start, d) for d in (torch.float64, dtype))
    layouts = None if grads is None else itertools.cycle(grads)
    for _ in range(STEPS):
        found = random_grads(params, layouts)
        step(optimizer, params, found)
        exact.step([g.cpu() for g in found])
        plain.step(found)
    assert_equal(params, exact, plain)


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_separate_optimizers(name, backend):
    check_against_separate(name, SHAPES, torch.float64, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "runner"),
    runs(torch.float32, torch.bfloat16, torch.float16, torch.float64, op="sgd_step"),
    indirect=["runner"],
)
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_backend_and_dtype(name, dtype, runner):
    shapes = SHAPES if not runner.slow else SHAPES[2:7]
    check_against_separate(name, shapes, dtype, runner.device, runner.backend)


@pytest.mark.parametrize("runner", [r for r in HAVE_STEPS if r.isa in (None, "avx2")], ids=str, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad"])
def test_any_strides_of_parameters_and_gradients(name, layout, runner):
    shapes = ((3, 4), (4, 3, 2, 2))
    check_against_separate(name, shapes, torch.float32, runner.device, runner.backend, layout, LAYOUTS)


@pytest.mark.parametrize("runner", [r for r in HAVE_STEPS if r.isa in (None, "avx2")], ids=str, indirect=True)
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad"])
def test_gradients_that_are_expanded_or_lazily_negated(name, runner):
    start = values([(4, 5), (6,)], torch.float32, runner.device)
    params = [nn.Parameter(t.clone()) for t in start]
    optimizer = build(name, params, runner.backend)
    exact, plain = (Separate(kind_of(name), OPTIONS[name], start, d) for d in (torch.float64, torch.float32))
    first, second = values([(1, 1), (6,)], torch.float32, runner.device)
    grads = [first.expand(MEMBERS, 4, 5), torch._neg_view(second)]
    for _ in range(2):
        step(optimizer, params, grads)
        exact.step(grads)
        plain.step(grads)
    assert_equal(params, exact, plain)


@pytest.mark.parametrize("name", EVERYTHING)
def test_any_number_of_threads_gives_the_same_bits(name, threads):
    start = values([(30_011,), (7,), (101, 203), ()], torch.float32)
    found = []
    grads = [random_grads(start) for _ in range(2)]
    for count in (1, 2, 3):
        threads(count)
        params = [nn.Parameter(t.clone()) for t in start]
        optimizer = build(name, params, "cpu")
        for g in grads:
            step(optimizer, params, g)
        found.append(params)
    exact = Separate(kind_of(name), OPTIONS[name], start, torch.float64)
    plain = Separate(kind_of(name), OPTIONS[name], start, torch.float32)
    for g in grads:
        exact.step(g), plain.step(g)
    assert_equal(found[0], exact, plain)
    for p, *others in zip(*found):
        assert all(torch.equal(p, other) for other in others)


@pytest.mark.parametrize(("name", "op"), [("sgd-nesterov", "sgd_step_"), ("adamw-amsgrad", "adamw_step_")])
def test_all_parameters_of_a_group_are_one_call(name, op, monkeypatch):
    """And no tensor of their size is made besides."""
    params = [nn.Parameter(t) for t in values([(1000,), (7, 300), (5,)], torch.float32)]
    optimizer = build(name, params, "cpu")
    step(optimizer, params, random_grads(params))
    calls, run = [], getattr(native, op)
    monkeypatch.setattr(native, op, lambda *tensors: (calls.append(tensors[0]), run(*tensors)))
    grads = random_grads(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(optimizer, params, grads)
    assert [len(each) for each in calls] == [3]
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocated) < 4 * 1000
    assert all(p is q for p, q in zip(calls[0], params))


@pytest.mark.parametrize("kind", OURS)
def test_equal_hyperparameters_are_pytorchs_own_step_on_stacked_parameters(kind):
    options = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, "adamw": {"lr": 0.01}}[kind]
    params = [nn.Parameter(t) for t in values([(17,), (5, 3)], torch.float64)]
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    ours, foreach = OURS[kind](params, **options), THEIRS[kind](theirs, **options, foreach=True)
    for _ in range(STEPS):
        grads = random_grads(params)
        step(ours, params, grads)
        step(foreach, theirs, grads)
    for p, q in zip(params, theirs):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", OURS)
def test_defaults_are_pytorchs(kind):
    params = [nn.Parameter(t) for t in values([(17,)], torch.float64)]
    theirs = [nn.Parameter(p.detach().clone()) for p in params]
    ours, own_ = OURS[kind](params), THEIRS[kind](theirs)
    for _ in range(STEPS):
        grads = random_grads(params)
        step(ours, params, grads)
        step(own_, theirs, grads)
    torch.testing.assert_close(params[0], theirs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["sgd-momentum-of_some", "sgd-decay", "adamw-amsgrad"])
def test_a_member_that_diverges_is_as_it_is_alone(name, backend):
    params = [nn.Parameter(t) for t in values([(6,)], torch.float64)]
    separate = Separate(kind_of(name), OPTIONS[name], params, torch.float64)
    optimizer = build(name, params, backend)
    for n in range(STEPS):
        grads = random_grads(params)
        if n == 1:
            grads[0][0, 0], grads[0][1, 1], grads[0][1, 2] = float("inf"), float("nan"), float("-inf")
        step(optimizer, params, grads)
        separate.step(grads)
    assert_equal(params, separate)


# -------------------------------------------------------------------------------------------------- whole models


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 11), nn.LayerNorm(11), nn.GELU(), nn.Linear(11, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-decay"])
@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_stacked_models_train_as_they_do_alone(make, name, channels_last):
    models = [make().double() for _ in range(MEMBERS)]
    if channels_last:
        models = [m.to(memory_format=torch.channels_last) for m in models]
    ensemble = ek.stack(models)
    optimizer = build(name, ensemble.parameters())
    alone = [
        THEIRS[kind_of(name)](m.parameters(), **{k: own(option, e) for k, option in OPTIONS[name].items()})
        for e, m in enumerate(models)
    ]
    for _ in range(STEPS):
        x = torch.randn(9, 6, dtype=torch.float64) if make is perceptron else torch.randn(9, 2, 6, 6).double()
        labels = torch.randint(3, (9,))
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(logits, labels) for logits in ensemble(x)).backward()
        norms = ek.optim.clip_grad_norm_(ensemble.parameters(), [0.5, 1.0, 100.0])
        optimizer.step()
        for e, (model, own_) in enumerate(zip(models, alone)):
            own_.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), (0.5, 1.0, 100.0)[e])
            torch.testing.assert_close(norms[e], norm, rtol=1e-8, atol=1e-8)
            own_.step()
    for found, model in zip(ek.unstack(ensemble), models):
        for p, q in zip((*found.parameters(), *found.buffers()), (*model.parameters(), *model.buffers())):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", OURS)
def test_what_members_share_has_hyperparameters_of_its_own(kind):
    """BatchEnsemble: W by one learning rate, r, s and biases by those of their members."""
    layer = ek.nn.BatchEnsembleLinear(5, 4, MEMBERS).double()
    shared, others = layer.weight, [p for p in layer.parameters() if p is not layer.weight]
    assert shared.shape[0] != MEMBERS
    assert all(len(p) == MEMBERS for p in others)
    separate = Separate(kind, {"lr": LR}, others, torch.float64)
    weight = nn.Parameter(shared.detach().clone())
    theirs = THEIRS[kind]([weight], lr=0.02)
    optimizer = OURS[kind]([{"params": others}, {"params": [shared], "members": False, "lr": 0.02}], lr=LR)
    optimizer.active = [True, False, True]  # which is nothing to what is shared
    for _ in range(STEPS):
        optimizer.zero_grad()
        layer(torch.randn(7, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        separate.step([p.grad for p in others], [0, 2])
        weight.grad = shared.grad
        theirs.step()
    assert_equal(others, separate)
    torch.testing.assert_close(shared, weight, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ active members


@pytest.mark.parametrize("runner", [Runner("reference"), *HAVE_STEPS], ids=str, indirect=True)
@pytest.mark.parametrize("name", EVERYTHING)
def test_members_that_are_not_active_keep_every_bit(name, runner):
    start = values([(17,), (3, 5), ()], torch.float32, runner.device)
    params = [nn.Parameter(t.clone()) for t in start]
    optimizer = build(name, params, runner.backend)
    exact, plain = (Separate(kind_of(name), OPTIONS[name], start, d) for d in (torch.float64, torch.float32))
    # Member 1 begins late, member 0 pauses.
    for active in ([True, False, True], [True, True, False], [False, True, True], None):
        kept = [m for m in range(MEMBERS) if active and not active[m]]
        optimizer.active = active
        grads = random_grads(params)
        exact.step(grads, [m for m in range(MEMBERS) if m not in kept])
        plain.step(grads, [m for m in range(MEMBERS) if m not in kept])
        for g in grads:
            g[kept] = float("nan")
        before = [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]
        step(optimizer, params, grads)
        after = [t.detach() for p in params for t in (p, *optimizer.state[p].values())]
        if len(before) == len(after):
            for a, b in zip(before, after):
                assert torch.equal(a[kept], b[kept])
        assert_equal(params, exact, plain)
