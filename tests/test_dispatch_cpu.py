"""Automatic choice on a CPU: torch's own products where they were measured faster."""

from __future__ import annotations

import pytest
import torch

from effens_kernels import grouped_linear
from effens_kernels.ops.grouped_linear.autograd import FORM


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_very_few_rows_of_large_weights_are_torchs(batch, seed, monkeypatch):
    """By the stated rule; whatever is chosen, the values are right."""
    ran = []
    kernel = FORM.kernels("cpu").fwd
    monkeypatch.setattr(FORM.kernels("cpu"), "fwd", lambda *a: (ran.append(True), kernel(*a))[1])
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, batch, 512), (2, 512, 512)))
    expected = torch.einsum("ebi,eoi->ebo", x, weight)
    torch.testing.assert_close(grouped_linear(x, weight), expected, rtol=1e-4, atol=1e-3)
    assert bool(ran) == (batch >= 4)
    ran.clear()
    torch.testing.assert_close(grouped_linear(x, weight.requires_grad_()), expected, rtol=1e-4, atol=1e-3)
    assert bool(ran) == (batch >= 2)
    ran.clear()
    grouped_linear(x, weight, backend="cpu")
    assert ran
