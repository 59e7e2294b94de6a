"""EnsembleSGD and EnsembleAdamW as optimizers of PyTorch: schedulers, checkpoints, closures, autograd, modes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optim_cases import LR, MEMBERS, OPTIONS, Separate, assert_equal, build, own, random_grads, step, values
from torch import nn
from torch.optim import lr_scheduler as schedulers

import effens_kernels as ek

SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 1 / (n + 1)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, 8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 2), schedulers.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, 3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_set_the_learning_rates_of_all_members(schedule):
    name = "sgd-momentum"
    params = [nn.Parameter(t) for t in values([(7,)], torch.float64)]
    separate = Separate("sgd", OPTIONS[name], params, torch.float64)
    optimizer = build(name, params)
    ours = SCHEDULES[schedule](optimizer)
    theirs = [SCHEDULES[schedule](o) for o in separate.optimizers]
    for _ in range(7):
        rates = [o.param_groups[0]["lr"] for o in separate.optimizers]
        found = torch.as_tensor(optimizer.param_groups[0]["lr"]).expand(MEMBERS)
        torch.testing.assert_close(found.as_subclass(torch.Tensor), torch.tensor(rates).double(), rtol=1e-6, atol=0)
        grads = random_grads(params)
        step(optimizer, params, grads)
        separate.step(grads)
        for s in (ours, *theirs):
            s.step()
    assert_equal(params, separate)


def test_schedulers_of_members_with_peaks_of_their_own():
    """What a scheduler takes may be per member too; it replaces other hyperparameters as well."""
    params = [nn.Parameter(t) for t in values([(7,)], torch.float64)]
    separate = Separate("adamw", OPTIONS["adamw"], params, torch.float64)
    optimizer = build("adamw", params)
    ours = schedulers.OneCycleLR(optimizer, torch.tensor(LR, dtype=torch.float64), 8)
    theirs = [schedulers.OneCycleLR(o, lr, 8) for o, lr in zip(separate.optimizers, LR)]
    for _ in range(7):
        grads = random_grads(params)
        step(optimizer, params, grads)
        separate.step(grads)
        for s in (ours, *theirs):
            s.step()
    assert_equal(params, separate)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad"])
def test_training_goes_on_from_a_checkpoint(name):
    params = [nn.Parameter(t) for t in values([(7,), (3, 2)], torch.float64)]
    optimizer = build(name, params)
    schedule = schedulers.CosineAnnealingLR(optimizer, 10)
    grads = [random_grads(params) for _ in range(4)]
    for g in grads[:2]:
        step(optimizer, params, g)
        schedule.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = build(name, others, lr=1.0)
    continued = schedulers.CosineAnnealingLR(other, 10)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    for target, state in zip((other, continued), torch.load(file, weights_only=True)):
        target.load_state_dict(state)
    for g in grads[2:]:
        step(optimizer, params, g)
        step(other, others, g)
        schedule.step()
        continued.step()
    for p, q in zip(params, others):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad"])
def test_steps_stay_on_the_cpu_wherever_a_checkpoint_was_loaded(name):
    """`torch.load(..., map_location="cuda")` moves them too."""
    place = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": torch.float32}
    params = [nn.Parameter(t) for t in values([(7,), (3, 2)], torch.float64)]
    optimizer = build(name, params)
    step(optimizer, params, random_grads(params))
    saved = optimizer.state_dict()
    states = {n: {**state, "step": state["step"].to(**place)} for n, state in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": states})
    step(optimizer, params, random_grads(params))
    for p in params:
        steps = optimizer.state[p]["step"]
        assert (steps.device.type, steps.dtype) == ("cpu", torch.float64)
        assert steps.max() == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad"])
def test_a_copy_goes_on_by_itself(name, copied):
    params = [nn.Parameter(t) for t in values([(7,), (3, 2)], torch.float64)]
    optimizer = build(name, params, "cpu")
    grads = [random_grads(params) for _ in range(3)]
    step(optimizer, params, grads[0])
    other = copied(optimizer)
    others = other.param_groups[0]["params"]
    assert (other.num_members, other.backend) == (MEMBERS, "cpu")
    for target, tensors in ((optimizer, params), (other, others)):
        for g in grads[1:]:
            step(target, tensors, g)
    for p, q in zip(params, others):
        assert p is not q
        assert torch.equal(p, q)


def test_state_dict_holds_plain_tensors():
    params = [nn.Parameter(t) for t in values([(7,)], torch.float32)]
    optimizer = build("adamw-betas", params)
    schedulers.ExponentialLR(optimizer, 0.5)
    step(optimizer, params, random_grads(params))
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    found = [group["initial_lr"], *group["betas"], group["eps"], *state["state"][0].values()]
    assert {type(t) for t in found if isinstance(t, torch.Tensor)} == {torch.Tensor}
    assert group["betas"][0].tolist() == [0.9, 0.0, 0.5]


def test_hyperparameters_may_be_replaced_in_the_groups():
    params = [nn.Parameter(t) for t in values([(7,)], torch.float64)]
    separate = Separate("sgd", {"lr": 0.1}, params, torch.float64)
    optimizer = ek.optim.EnsembleSGD(params, 0.1)
    for rates in (torch.tensor(LR), [0.5, 0.25, 0.125], 0.01, 1):
        optimizer.param_groups[0]["lr"] = rates
        for e, o in enumerate(separate.optimizers):
            o.param_groups[0]["lr"] = float(own(rates, e))
        grads = random_grads(params)
        step(optimizer, params, grads)
        separate.step(grads)
    assert_equal(params, separate)


def test_momentum_that_begins_later_and_pauses():
    """As OneCycleLR does: a member's first buffer is its first gradient since then, and rests while it has none."""
    options = {"lr": 0.1, "momentum": [0.9, 0.0, 0.5], "dampening": 0.5}
    params = [nn.Parameter(t) for t in values([(7,)], torch.float64)]
    separate = Separate("sgd", options, params, torch.float64)
    optimizer = ek.optim.EnsembleSGD(params, **options)
    for momentum in ([0.9, 0.0, 0.5], [0.0, 0.0, 0.5], [0.9, 0.9, 0.0], 0.0, [0.5, 0.5, 0.5]):
        optimizer.param_groups[0]["momentum"] = momentum
        for e, o in enumerate(separate.optimizers):
            o.param_groups[0]["momentum"] = own(momentum, e)
        grads = random_grads(params)
        step(optimizer, params, grads)
        separate.step(grads)
    assert_equal(params, separate)


def test_closures_and_missing_gradients():
    params = [nn.Parameter(t) for t in values([(7,), (2,)], torch.float64)]
    separate = Separate("adamw", OPTIONS["adamw"], params, torch.float64)
    optimizer = build("adamw", params)
    for given in ((True, False), (True, True), (False, True), (False, False)):
        grads = [g if there else None for g, there in zip(random_grads(params), given)]

        def closure(grads=grads):
            assert torch.is_grad_enabled()
            for p, g in zip(params, grads):
                p.grad = g
            return 3.5

        assert optimizer.step(closure) == 3.5
        separate.step(grads)
    assert_equal(params, separate)
    assert optimizer.state[params[1]]["step"].tolist() == [2.0] * MEMBERS


def test_autograd_finds_out_about_the_step():
    """As after any change in place, of what a graph still needs."""
    p = nn.Parameter(torch.randn(MEMBERS, 4))
    optimizer = ek.optim.EnsembleSGD([p], backend="cpu")
    y = p.square().sum()
    p.grad = torch.randn_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradient_scaler():
    p = nn.Parameter(torch.randn(MEMBERS, 4, dtype=torch.float32))
    separate = Separate("sgd", {"lr": LR}, [p], torch.float32)
    optimizer, scaler = ek.optim.EnsembleSGD([p], LR), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for good in (True, False, True):
        g = torch.randn_like(p)
        scaler.scale(torch.ones(()))
        p.grad = g * scaler.get_scale() * (1.0 if good else float("inf"))
        scaler.step(optimizer)
        scaler.update()
        if good:
            separate.step([g])
    torch.testing.assert_close(p.detach(), separate.stacked()[0])


def test_dispatch_modes_see_pytorchs_own_operations():
    from torch.utils.flop_counter import FlopCounterMode

    params = [nn.Parameter(t) for t in values([(7,)], torch.float64)]
    separate = Separate("adamw", OPTIONS["adamw"], params, torch.float64)
    optimizer = build("adamw", params)
    grads = random_grads(params)
    with FlopCounterMode(display=False):
        step(optimizer, params, grads)
    separate.step(grads)
    assert_equal(params, separate)


def test_active_is_an_option_that_checkpoints_keep():
    params = [nn.Parameter(t) for t in values([(4,)], torch.float32)]
    optimizer = build("adamw", params, active=torch.tensor([True, False, True]))
    other = build("adamw", [nn.Parameter(p.detach().clone()) for p in params])
    assert other.active is None
    other.load_state_dict(optimizer.state_dict())
    assert other.active.tolist() == [True, False, True]
