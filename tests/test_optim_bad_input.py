"""EnsembleSGD and EnsembleAdamW refuse bad input by name, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from optim_cases import LR, OURS, step
from torch import nn

import effens_kernels as ek
from effens_kernels import _native


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape).to(dtype))


BAD = {
    "lr-negative": (ValueError, {"lr": [0.1, -0.1, 0.1]}, "lr should be a number of at least 0.*got -0.1 at member 1"),
    "lr-nan": (ValueError, {"lr": float("nan")}, "lr should be a number of at least 0.*got nan"),
    "lr-count": (ValueError, {"lr": [0.1, 0.1]}, r"should be \[E=2, \.\.\.\].*got float32\[3, 4\]"),
    "lr-matrix": (ValueError, {"lr": torch.ones(3, 1)}, r"lr should be .* got float32\[3, 1\]"),
    "lr-string": (TypeError, {"lr": "0.1"}, "lr should be a number of at least 0"),
    "lr-bool": (TypeError, {"lr": True}, "lr should be a number"),
    "lr-of strings": (TypeError, {"lr": ["a", "b", "c"]}, "lr should be a number"),
    "two counts": (ValueError, {"lr": LR, "weight_decay": [0.1]}, "weight_decay should be of E=3 members, got 1"),
    "active-count": (ValueError, {"lr": LR, "active": [True]}, "active should be of E=3 members, got 1"),
    "active-floats": (TypeError, {"active": [1.0, 0.0, 1.0]}, r"active should be None or bool \[E\]"),
    "maximize": (TypeError, {"maximize": 1}, "maximize should be a bool"),
    "backend": (ValueError, {"backend": "fast"}, "backend should be None or one of"),
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case, kind):
    error, options, message = BAD[case]
    p = parameter(3, 4)
    with pytest.raises(error, match=message):
        step(OURS[kind]([p], **options), [p], [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("kind", "error", "options", "message"),
    [
        ("adamw", ValueError, {"betas": (0.9, [0.9, 1.0, 0.9])}, r"betas\[1\] should be .* got 1.0 at member 1"),
        ("adamw", TypeError, {"betas": 0.9}, "betas should be a pair"),
        ("adamw", ValueError, {"eps": -1.0}, "eps should be a number of at least 0"),
        ("adamw", TypeError, {"amsgrad": 1}, "amsgrad should be a bool"),
        ("sgd", ValueError, {"momentum": -0.1}, "momentum should be a number of at least 0"),
        ("sgd", ValueError, {"nesterov": True, "momentum": [0.9, 0.0, 0.9]}, "nesterov should be with momentum"),
        ("sgd", ValueError, {"nesterov": True, "momentum": 0.9, "dampening": [0, 0, 1]}, "nesterov should be with"),
    ],
)
def test_bad_options_of_one_kind_are_named(kind, error, options, message):
    with pytest.raises(error, match=message):
        OURS[kind]([parameter(3, 4)], **options)


@pytest.mark.parametrize("kind", OURS)
def test_bad_parameters_are_named(kind):
    good = parameter(3, 4)
    name = OURS[kind].__name__
    shared = r"should be \[E=3, \.\.\.\] \(what members share goes in a group with members=False\)"
    for params, error, message in (
        ([good, parameter(5, 4)], ValueError, rf"{name}: params\[1\] {shared}, got float32\[5, 4\]"),
        ([("a", good), ("b", parameter(5, 4))], ValueError, rf"{name}: parameter 'b' {shared}"),
        ([good, nn.Parameter(torch.tensor(1.0))], ValueError, r"params\[1\] should be \[E, \.\.\.\]"),
        ([parameter(0, 4)], ValueError, r"params\[0\] should be \[E, \.\.\.\]"),
        ([parameter(3, 4, dtype=torch.complex64)], TypeError, r"params\[0\] should be of float32"),
        ([{"params": [good], "members": False, "lr": LR}], ValueError, "lr should be one number in a group"),
        ([{"params": [good], "members": 0}], TypeError, "members should be a bool"),
    ):
        with pytest.raises(error, match=message):
            OURS[kind](params)


def test_a_parameter_is_in_a_group_once():
    good = parameter(3, 4)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="params should be different"):
        ek.optim.EnsembleSGD([good, good])


def test_a_group_that_does_not_fit_is_not_added():
    optimizer = ek.optim.EnsembleSGD([parameter(3, 4)], LR)
    with pytest.raises(ValueError, match="got float32"):
        optimizer.add_param_group({"params": [parameter(5, 4)]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.num_members == 3
    optimizer.add_param_group({"params": [parameter(3, 2)], "lr": [0.5, 0.5, 0.5]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("kind", OURS)
def test_bad_gradients_and_changes_are_named_before_anything_is_computed(kind):
    first, second = parameter(3, 4), parameter(3, 4)
    optimizer = OURS[kind]([{"params": [first]}, {"params": [second]}], LR)
    first.grad, second.grad = torch.randn(3, 4), torch.randn(3, 4).to_sparse()
    before = first.detach().clone()
    with pytest.raises(TypeError, match=r"params\[0\]\.grad should be dense"):
        optimizer.step()
    second.grad = None
    second.grad_dtype = None  # which lets it be anything
    second.grad = torch.randn(3, 4).double()
    with pytest.raises(TypeError, match=r"params\[0\]\.grad should be of torch.float32 like its parameter"):
        optimizer.step()
    second.grad = torch.randn(3, 4)
    optimizer.param_groups[1]["lr"] = [0.1, 0.2]
    with pytest.raises(ValueError, match="lr should be of E=3 members, got 2"):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state


def test_a_state_of_another_ensemble_is_named_and_not_loaded():
    p, q, r = parameter(3, 4), parameter(2, 4), parameter(3, 4)
    optimizer, other, plain = ek.optim.EnsembleAdamW([p]), ek.optim.EnsembleAdamW([q]), torch.optim.AdamW([r])
    for each, t in ((optimizer, p), (other, q), (plain, r)):
        step(each, [t], [torch.randn_like(t)])
    for state, message in (
        (optimizer.state_dict(), r"state 'step' should be \[2\], got float64\[3\]"),
        (plain.state_dict(), r"state 'step' should be \[2\], got float32\[\]"),
    ):
        with pytest.raises(ValueError, match=f"EnsembleAdamW: {message}"):
            other.load_state_dict(state)
    state = other.state_dict()
    state["state"] = {0: {"step": torch.ones(2), "exp_avg": torch.zeros(3, 4)}}
    with pytest.raises(ValueError, match=r"state 'exp_avg' should be \[2, 4\], got float32\[3, 4\]"):
        other.load_state_dict(state)
    assert other.state[q]["exp_avg"].shape == q.shape
    step(other, [q], [torch.randn_like(q)])


def test_the_engine_checks_what_it_is_given():
    if not _native.available:
        pytest.skip(_native.why_not())
    p, table = torch.randn(3, 4), torch.zeros(1, 3, 7, dtype=torch.float64)
    run = _native.ops.sgd_step_
    for arguments, message in (
        (([p], [torch.randn(3, 5)], [], table, False), "grads.0. does not fit"),
        (([p], [torch.randn(4, 3).mT], [], table, False), "grads.0. does not fit"),
        (([p], [torch.randn(3, 4).double()], [], table, False), "grads.0. does not fit"),
        (([p], [p], [p, p], table, False), "as many states"),
        (([p], [p], [], table.float(), False), "coefficients should be"),
        (([p], [p], [], table[..., :6], False), "coefficients should be"),
        (([torch.randn(5, 4)], [torch.randn(5, 4)], [], table, False), "params.0. should be"),
        (([p[:, ::2]], [p[:, ::2]], [], table, False), "params.0. should be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)
