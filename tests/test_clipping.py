"""clip_grad_norm_: the values of PyTorch's for each member's model."""

from __future__ import annotations

from math import inf

import pytest
import torch
from optim_cases import MEMBERS, laid_out, values
from torch import nn

from effens_kernels.optim import clip_grad_norm_
from effens_kernels.testing import assert_accurate

MAX_NORMS = [0.5, 20.0, 3.0]
SHAPES = ((), (1,), (17,), (0, 4), (5, 3), (2, 3, 3, 3))


def with_gradients(dtype: torch.dtype, layout: str = "contiguous") -> list[nn.Parameter]:
    params = [nn.Parameter(t) for t in values(SHAPES, dtype)]
    for p, g in zip(params, values(SHAPES, dtype)):
        p.grad = laid_out(g, layout)
    return [nn.Parameter(torch.zeros(MEMBERS, 7, dtype=dtype)), *params]  # one of them without a gradient


def of_member(params: list[nn.Parameter], member: int, dtype: torch.dtype) -> list[nn.Parameter]:
    alone = [nn.Parameter(p.detach()[member].to(dtype)) for p in params]
    for p, own in zip(params, alone):
        own.grad = None if p.grad is None else p.grad[member].to(dtype, copy=True)
    return [p for p in alone if p.numel()]  # of which PyTorch has no largest magnitude


def separate(params, max_norms, norm_type, dtype):
    """(norms, gradients) of PyTorch's clipping, model by model."""
    models = [of_member(params, e, dtype) for e in range(MEMBERS)]
    norms = [nn.utils.clip_grad_norm_(model, max_norms[e], norm_type) for e, model in enumerate(models)]
    return torch.stack(norms), [
        torch.stack([p.grad for p in each]) for each in zip(*models) if each[0].grad is not None
    ]


@pytest.mark.parametrize("layout", ["contiguous", "members inside", "gaps"])
@pytest.mark.parametrize("norm_type", [2, 1, inf, 3.5, -inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_clipping_of_each_model(dtype, norm_type, layout):
    params = with_gradients(dtype, layout)
    exact_norms, exact = separate(params, MAX_NORMS, norm_type, torch.float64)
    plain_norms, plain = separate(params, MAX_NORMS, norm_type, dtype)
    norms = clip_grad_norm_(iter(params), MAX_NORMS, norm_type)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    assert_accurate(norms, exact_norms, plain_norms.to(norms.dtype), "norms", 200)
    found = [p.grad for p in params if p.grad is not None and p.numel()]
    assert len(found) == len(exact)
    for g, e, p in zip(found, exact, plain):
        assert_accurate(g, e, p, f"gradient {list(g.shape)}", 200)


def test_one_limit_for_all_and_a_single_tensor():
    p = with_gradients(torch.float64)[3]
    before = p.grad.clone()
    norms = clip_grad_norm_(p, 2.0)
    torch.testing.assert_close(norms, before.norm(dim=1))
    torch.testing.assert_close(p.grad, before * (2.0 / (norms + 1e-6)).clamp(max=1).unsqueeze(1))


def test_a_member_that_explodes_leaves_the_others_alone():
    params = with_gradients(torch.float32)
    params[3].grad[1, 0] = inf
    expected_norms, expected = separate(params, [1.0] * MEMBERS, 2.0, torch.float32)
    norms = clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norms, expected_norms)
    found = [p.grad for p in params if p.grad is not None and p.numel()]
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert all(g[[0, 2]].isfinite().all() for g in found)


def test_error_if_nonfinite_names_members_and_changes_nothing():
    params = with_gradients(torch.float32)
    params[3].grad[1, 0] = float("nan")
    before = [p.grad.clone() for p in params[1:]]
    with pytest.raises(RuntimeError, match="the norm of the gradients of member 1 is not finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    for p, g in zip(params[1:], before):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    params[3].grad[1, 0] = 0.0
    assert clip_grad_norm_(params, 1.0, error_if_nonfinite=True).isfinite().all()


def test_without_gradients_norms_are_zero():
    assert clip_grad_norm_([nn.Parameter(torch.randn(4, 2))], 1.0).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("error", "parameters", "options", "message"),
    [
        (ValueError, [], {}, "parameters should be at least one"),
        (TypeError, [3.0], {}, r"parameters\[0\] should be a torch.Tensor"),
        (ValueError, [torch.randn(3, 2), torch.randn(2, 2)], {}, r"parameters\[1\] should be \[E=3, \.\.\.\]"),
        (ValueError, [torch.tensor(1.0)], {}, r"parameters\[0\] should be \[E, \.\.\.\]"),
        (ValueError, [torch.randn(3, 2)], {"max_norm": [1.0, 1.0]}, r"parameters\[0\] should be \[E=2, \.\.\.\]"),
        (TypeError, [torch.randn(3, 2)], {"max_norm": "1"}, "max_norm should be a number"),
        (TypeError, [torch.randn(3, 2)], {"norm_type": "inf"}, "norm_type should be a number"),
    ],
)
def test_bad_input_is_named(error, parameters, options, message):
    with pytest.raises(error, match=f"clip_grad_norm_: {message}"):
        clip_grad_norm_(parameters, **{"max_norm": 1.0, **options})


def test_without_a_limit_norms_alone_are_computed():
    params = with_gradients(torch.float32)
    before = [p.grad.clone() for p in params[1:]]
    expected, _ = separate(params, [inf] * MEMBERS, 2.0, torch.float32)
    torch.testing.assert_close(clip_grad_norm_(params, inf), expected)
    clip_grad_norm_(params, [inf] * MEMBERS)
    assert all(torch.equal(p.grad, g) for p, g in zip(params[1:], before))


def test_sparse_gradients_are_named():
    p = nn.Parameter(torch.randn(3, 2))
    p.grad = torch.randn(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"parameters\[0\]\.grad should be a dense"):
        clip_grad_norm_([p], 1.0)
