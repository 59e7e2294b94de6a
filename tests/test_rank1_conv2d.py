"""BatchEnsemble convolutions: what is theirs alone.  `test_member_convolution.py` has values and derivatives."""

from __future__ import annotations

import pytest
import torch
from conv_cases import Rank1ConvCase as Case
from torch import Tensor

from effens_kernels import rank1_conv2d
from effens_kernels.ops.rank1_conv2d import folded


def test_scales_of_zero_stay_in_their_member():
    inputs = Case().inputs_for()
    expected = rank1_conv2d(*inputs)
    inputs[2][1, 2] = 0
    inputs[3][1, 3] = 0
    assert torch.equal(rank1_conv2d(*inputs)[[0, 2]], expected[[0, 2]])


def test_one_tensor_in_two_places():
    """r and s may be one tensor, and depend on x; a gradient penalty then has every path."""
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)

    def penalty(x, backend):
        scale = x.mean((1, 3, 4))
        (grad,) = torch.autograd.grad(
            rank1_conv2d(x, weight, scale, scale, backend=backend).square().sum(), x, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty(x, None), penalty(x, "reference"), rtol=1e-11, atol=1e-9)


def test_forward_mode_needs_no_named_backend():
    inputs = tuple(Case(shared=True).inputs_for(torch.float64))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    expected = torch.func.jvp(lambda *args: rank1_conv2d(*args, backend="reference"), inputs, tangents)
    for actual, value in zip(torch.func.jvp(rank1_conv2d, inputs, tangents), expected):
        torch.testing.assert_close(actual, value)


# --------------------------------------------------------------------------------------------------------- dispatch


def test_pointwise_convolutions_are_linear_layers_of_pixels(monkeypatch):
    """On the CPU engine, where it runs; else folded."""
    inputs = Case(kernel=(1, 1), layout="channels_last").inputs_for()
    monkeypatch.setattr(folded, "apply", lambda *_: "folded")
    assert isinstance(rank1_conv2d(*inputs), Tensor)
    assert rank1_conv2d(*inputs, stride=2) == "folded"
    assert rank1_conv2d(inputs[0].contiguous(), *inputs[1:]) == "folded"
    monkeypatch.setattr("effens_kernels._dispatch.selects", lambda *_: False)
    assert rank1_conv2d(*inputs) == "folded"


def test_backend_from_the_environment(monkeypatch):
    """EFFENS_BACKEND counts as a named backend: the reference, or a refusal."""
    inputs = Case().inputs_for(torch.bfloat16)
    monkeypatch.setattr("effens_kernels._env.BACKEND", "reference")
    assert torch.equal(rank1_conv2d(*inputs), rank1_conv2d(*inputs, backend="reference"))
    monkeypatch.setattr("effens_kernels._env.BACKEND", "cpu")
    with pytest.raises(ValueError, match="rank1_conv2d: backend 'cpu' cannot run this call"):
        rank1_conv2d(*inputs)
