"""Cases of ensemble_predict on GPU kernels, called by themselves, and what they are compared with."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from effens_kernels.ops.ensemble_predict import reference
from effens_kernels.ops.ensemble_predict_regression import reference as regression_reference
from effens_kernels.testing import assert_accurate, strided

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = "mean_probs", "variance", "entropy", "expected_entropy", "mutual_information"
REGRESSION_NAMES = "mean", "variance", "aleatoric", "epistemic"


def logits_of(sizes: tuple[int, int, int], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(torch.initial_seed())
    return (2 * strided(sizes, layout, generator, torch.float64, "cpu")).to(device, dtype)


def check(kernels: ModuleType, logits: Tensor) -> tuple[Tensor, ...]:
    """Forward, and backward with every gradient, against float64."""
    found = kernels.fwd(logits)
    wide = logits.double().requires_grad_()
    exact, composition = reference.fwd(wide), reference.fwd(logits)
    terms = logits.shape[0] * logits.shape[2]
    for name, ours, right, theirs in zip(NAMES, found, exact, composition):
        assert ours.is_contiguous(), name
        assert_accurate(ours, right.detach(), theirs, name, terms)
    torch.testing.assert_close(found[5], exact[5].float())
    grads = [torch.randn(t.shape).to(t) for t in composition[:5]]
    dlogits = kernels.bwd(logits, found[0], *grads)
    assert dlogits.is_contiguous()
    (exact,) = torch.autograd.grad(exact[:5], wide, [g.double() for g in grads])
    assert_accurate(dlogits, exact, reference.bwd(logits, composition[0], *grads), "gradient", terms)
    return *found, dlogits


def check_each_gradient_alone(kernels: ModuleType, logits: Tensor) -> None:
    """And none, which gives zeros."""
    mean = kernels.fwd(logits)[0]
    results = reference.fwd(logits)[:5]
    nothing = mean.new_empty(0)
    for which in range(6):
        grads = [torch.randn(t.shape).to(t) if i == which else nothing for i, t in enumerate(results)]
        exact = reference.bwd(logits.double(), mean.double(), *(g.double() for g in grads))
        ours, theirs = kernels.bwd(logits, mean, *grads), reference.bwd(logits, mean, *grads)
        assert_accurate(ours, exact, theirs, f"gradient of result {which}", logits.shape[0] * logits.shape[2])


def check_regression(kernels: ModuleType, means: Tensor, variances: Tensor | None) -> tuple[Tensor, ...]:
    """Forward and backward, all gradients and each alone, against float64."""
    found = kernels.fwd(means, variances)
    wide = [None if t is None else t.double() for t in (means, variances)]
    exact, composition = regression_reference.fwd(*wide), regression_reference.fwd(means, variances)
    for name, ours, right, theirs in zip(REGRESSION_NAMES, found, exact, composition, strict=True):
        assert ours.is_contiguous(), name
        assert_accurate(ours, right, theirs, name, means.shape[0])
    needs = True, variances is not None
    every = [torch.randn(t.shape).to(t) for t in found]
    nothing = found[0].new_empty(0)
    for given in (every, *([g if i == j else nothing for j, g in enumerate(every)] for i in range(4))):
        grads = kernels.bwd(means, found[0], *given, *needs)
        exact = regression_reference.bwd(wide[0], found[0].double(), *(g.double() for g in given), *needs)
        composition = regression_reference.bwd(means, found[0], *given, *needs)
        for name, ours, right, theirs in zip(("means", "variances"), grads, exact, composition, strict=True):
            assert ours.is_contiguous(), name
            assert_accurate(ours, right, theirs, name, 4)
    return *found, *grads
