"""What only Triton's interpreter shows without a GPU: offsets that overflow 32 bits, the order of tiles, accuracy of
the activations.  That results are right in general is tested for every backend in test_ops.py."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run Triton kernels on CPU tensors", allow_module_level=True)
pytest.importorskip("triton")

from effens_kernels.ops import triton_engine as engine
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.ops.grouped_linear import triton as grouped_linear
from effens_kernels.testing import assert_accurate


def exact_and_composed(x, weight, grad, activation):
    """[y, dx, dW] in float64, and by PyTorch in the dtype of x."""
    results = []
    for dtype in (torch.float64, x.dtype):
        leaves = [t.to(dtype).contiguous().requires_grad_() for t in (x, weight)]
        y = reference.grouped_linear(*leaves, None, activation)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))])
    return results


def check(x, weight, grad, activation=None):
    y, _ = grouped_linear.fwd(x, weight, None, activation, False)
    dx, dw, _ = grouped_linear.bwd(grad, x, weight, y, activation, True, True, False)
    exact, composed = exact_and_composed(x, weight, grad, activation)
    for name, *values in zip(("y", "dx", "dW"), (y, dx, dw), exact, composed, strict=True):
        assert_accurate(*values, name=name)


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values with those strides; the pages between them are never touched."""
    storage = values.new_empty(sum((size - 1) * stride for size, stride in zip(values.shape, strides)) + 1)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    "strides",
    [
        pytest.param((1 << 30, 4, 1), id="members"),
        pytest.param((4, 1 << 25, 1), id="rows"),
        pytest.param((300, 1, 1 << 29), id="features"),
    ],
)
@pytest.mark.parametrize("which", ["x", "weight", "grad"])
def test_offsets_beyond_32_bits(strides: tuple[int, ...], which: str) -> None:
    """Every stride that a tensor can have, past 2**31 elements from its start."""
    tensors = {"x": torch.randn(3, 70, 5), "weight": torch.randn(3, 70, 5), "grad": torch.randn(3, 70, 70)}
    if which == "grad":
        tensors["grad"] = torch.randn(3, 70, 5)
        tensors["weight"] = torch.randn(3, 5, 5)
    tensors = {name: t.half() for name, t in tensors.items()}
    tensors[which] = spread(tensors[which], strides)
    assert (torch.tensor(tensors[which].shape) - 1) @ torch.tensor(strides) >= 2**31 - 1
    check(**tensors, activation="tanh" if which == "x" else None)


def test_shared_x_with_members_beyond_32_bits() -> None:
    """The sum over members walks through them by index: those offsets are 64-bit where they must be."""
    x, grad = torch.randn(9, 7).half(), torch.randn(3, 9, 5).half()
    weight = spread(torch.randn(3, 5, 7).half(), (1 << 30, 7, 1))
    check(x, weight, grad)
    check(x, weight.contiguous(), spread(grad, (1 << 30, 5, 1)))


# 8 row tiles are one group, 10 are more than one
@pytest.mark.parametrize(("rows", "shared"), [(127, False), (150, True)])
def test_order_of_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, shared: bool) -> None:
    """Each tile is computed once, whatever the number of row and column tiles."""
    monkeypatch.setitem(engine.TILES, "fma", (engine.Tile(16, 16, 16, 4, 2),))
    for plan in (grouped_linear._plan_fwd, grouped_linear._plan_dgrad, grouped_linear._plan_wgrad):
        plan.cache_clear()
    try:
        x = torch.randn(rows, 20) if shared else torch.randn(2, rows, 20)
        check(x, torch.randn(2, 35, 20), torch.randn(2, rows, 35), "relu")
        check(torch.randn(1, 20, 3), torch.randn(1, rows, 3), torch.randn(1, 20, rows), "tanh")
    finally:
        for plan in (grouped_linear._plan_fwd, grouped_linear._plan_dgrad, grouped_linear._plan_wgrad):
            plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name is not None])
def test_activations_over_their_range(activation: str, dtype: torch.dtype) -> None:
    """y = act(bias) and db = act'(bias), I = 0, value by value: from tiny to saturated, against PyTorch's own error."""
    z = torch.cat([torch.linspace(-12, 12, 301), torch.logspace(-6, 0, 60), torch.randn(100)]).to(dtype)
    x, weight, bias = z.new_empty(1, 1, 0), z.new_empty(1, len(z), 0), z[None]
    y, pre = grouped_linear.fwd(x, weight, bias, activation, True)
    saved = pre if ACTIVATIONS[activation].saves == "preactivation" else y
    grad = torch.ones_like(y)
    db = grouped_linear.bwd(grad, x, weight, saved, activation, False, False, True)[2]
    assert torch.equal(pre[0, 0], z)

    results = []
    for to in (torch.float64, dtype):
        leaf = z.to(to).requires_grad_()
        out = ACTIVATIONS[activation].apply(leaf)
        results.append((out.detach(), torch.autograd.grad(out.sum(), leaf)[0]))
    (y_exact, db_exact), (y_torch, db_torch) = results
    eps = torch.finfo(dtype).eps
    for ours, torchs, exact in ((y[0, 0], y_torch, y_exact), (db[0], db_torch, db_exact)):
        allowed = 2 * (torchs.double() - exact).abs() + 2 * eps * exact.abs() + 1.5e-7
        assert ((ours.double() - exact).abs() <= allowed).all()


def test_nan_goes_through_relu() -> None:
    x, weight = torch.tensor([[[float("nan")], [-1.0], [2.0]]]), torch.ones(1, 1, 1)
    y, _ = grouped_linear.fwd(x, weight, None, "relu", False)
    assert y[0, 0].isnan()
    assert y[0, 1:].flatten().tolist() == [0.0, 2.0]
    dx = grouped_linear.bwd(torch.full_like(y, 3.0), x, weight, y, "relu", True, False, False)[0]
    assert dx.flatten().tolist() == [3.0, 0.0, 3.0]  # as torch
