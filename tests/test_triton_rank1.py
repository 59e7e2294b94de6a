"""rank1_linear's Triton kernels in the interpreter: what the cases of test_ops.py do not reach.

There, as here, errors are measured against float64.  Tiles are small, since a program takes a tenth of a second.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run Triton kernels on CPU tensors", allow_module_level=True)
pytest.importorskip("triton")

from effens_kernels.ops import triton_engine as engine
from effens_kernels.ops._activations import ACTIVATIONS, saves_preactivation
from effens_kernels.ops.rank1_linear import reference
from effens_kernels.ops.rank1_linear import triton as rank1_linear
from effens_kernels.testing import Rank1Case, assert_accurate

NAMES = ("x", "weight", "r", "s", "bias")
ALL = (True,) * 5


def check(inputs, activation=None, grad=None, need=ALL):
    """Forward, and the gradients that are needed, against float64."""
    x, weight, r, s, _ = inputs
    y, z = rank1_linear.fwd(*inputs, activation, saves_preactivation(activation))
    grad = torch.randn(y.shape).to(y.dtype) if grad is None else grad
    saved = {"nothing": x.new_empty(0), "output": y, "preactivation": z}[ACTIVATIONS[activation].saves]
    grads = rank1_linear.bwd(grad, x, weight, r, s, saved, activation, *need)
    exact, composed = (derivatives(inputs, activation, grad, dtype) for dtype in (torch.float64, x.dtype))
    terms = r.shape[0] * max(1, x.shape[-2]) * max(1, *weight.shape)
    assert_accurate(y, exact["y"], composed["y"], "y", terms)
    for name, ours, needed in zip(NAMES, grads, need, strict=True):
        if not needed:
            assert ours.shape == (0,)
        elif name in exact:
            assert_accurate(ours, exact[name], composed[name], name, terms)
    if need[0]:
        assert grads[0].stride() == torch.empty_like(x).stride()


def derivatives(inputs, activation, grad, dtype):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
    y = reference.rank1_linear(*leaves, activation)
    named = {name: leaf for name, leaf in zip(NAMES, leaves) if leaf is not None}
    return {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), grad.to(dtype))))}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Rank1Case(3, 5, 7, 9, activation="relu"), torch.float32),  # few rows: the members make one product
        (Rank1Case(3, 5, 7, 9, activation="gelu", shared=True), torch.float32),
        (Rank1Case(2, 64, 9, 7, activation="silu"), torch.float32),  # enough rows: a product per member
        (Rank1Case(1, 5, 35, 20, bias=False), torch.float32),
        (Rank1Case(2, 17, 35, 20, activation="tanh", shared=True), torch.float16),  # more than a tile of each
        (Rank1Case(2, 17, 20, 35, activation="gelu"), torch.bfloat16),
    ],
    ids=str,
)
def test_values(case: Rank1Case, dtype: torch.dtype) -> None:
    check(case.inputs_for(dtype), case.activation)


@pytest.mark.parametrize("shared", [False, True])
def test_strides(shared: bool) -> None:
    """Transposed, stepped and expanded views; the bias of all members, which comes expanded; y.sum()'s gradient."""
    members, batch, inputs, outputs = 3, 4, 6, 5
    x = torch.randn(inputs, batch).mT if shared else torch.randn(batch, members, inputs).transpose(0, 1)
    weight = torch.randn(inputs, outputs).mT
    r, s = torch.randn(members, 2 * inputs)[:, 1::2], torch.randn(outputs, members).mT
    bias = torch.randn(outputs).expand(members, -1)
    check((x, weight, r, s, bias), "relu", torch.randn(()).expand(members, batch, outputs))
    check((x, weight, torch.randn(1, 1).expand(members, inputs), s, bias), "tanh")


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name: str) -> None:
    need = tuple(name == other for other in NAMES)
    check(Rank1Case(3, 5, 7, 18).inputs_for(), "tanh", need=need)


def test_groups_of_members() -> None:
    """Where tiles do not fill the device, groups of members have parts of dW; the last group is smaller."""
    x, weight, r, s, bias = Rank1Case(7, 3, 5, 6).inputs_for()
    y, _ = rank1_linear.fwd(x, weight, r, s, bias, None, False)
    strides = y.stride(), (0, 0, 0), x.stride(), weight.stride(), r.stride(), s.stride()
    need = (True, True, True, False)
    sums = rank1_linear._plan_wgrad(y.shape, x.shape, strides, None, need, x.dtype, "ieee", 0)
    assert sums.counts == (4, 1, 1, 0)  # of 2, 2, 2 and 1
    check((x, weight, r, s, bias), need=(False, *ALL[:3], False))


def test_order_of_parts() -> None:
    """More parts than are loaded at once, more results than a block has, and each of the three by itself."""
    block = engine.Block()
    sizes, counts = (300, 5, 257), (11, 2, 8)
    parts = [torch.randn(count, size) for count, size in zip(counts, sizes)]
    programs = sum(-(-size // block.BLOCK) for size in sizes)
    plan = engine.Plan.of(rank1_linear.rank1_linear_add_kernel, programs, (*sizes, *counts), block)
    results = [torch.full((size,), torch.nan) for size in sizes]
    engine.launch(plan, *parts, *results)
    for result, part in zip(results, parts):
        torch.testing.assert_close(result, part.sum(0))
    for which in range(3):
        alone = [size if i == which else 0 for i, size in enumerate(sizes)]
        programs = -(-sizes[which] // block.BLOCK)
        plan = engine.Plan.of(rank1_linear.rank1_linear_add_kernel, programs, (*alone, *counts), block)
        again = [torch.full((size,), torch.nan) if i == which else None for i, size in enumerate(sizes)]
        engine.launch(plan, *(p if i == which else None for i, p in enumerate(parts)), *again)
        assert torch.equal(again[which], results[which])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_empty(sizes: tuple[int, int, int, int], shared: bool) -> None:
    check(Rank1Case(*sizes, shared=shared).inputs_for(), "tanh")


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values with those strides; the pages between them are never touched."""
    storage = values.new_empty(sum((size - 1) * stride for size, stride in zip(values.shape, strides)) + 1)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    ("which", "strides"),
    [
        ("x", (1 << 30, 4, 1)),
        ("x", (8, 1 << 29, 1)),
        ("weight", (1 << 29, 1)),
        ("weight", (1, 1 << 29)),
        ("r", (1 << 30, 1)),
        ("s", (1, 1 << 29)),
        ("grad", (1 << 30, 5, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_offsets_beyond_32_bits(which: str, strides: tuple[int, ...]) -> None:
    tensors = {
        "x": torch.randn(3, 5, 5),
        "weight": torch.randn(5, 5),
        "r": torch.randn(3, 5),
        "s": torch.randn(3, 5),
        "grad": torch.randn(3, 5, 5),
    }
    tensors = {name: t.half() for name, t in tensors.items()}
    tensors[which] = spread(tensors[which], strides)
    assert (torch.tensor(tensors[which].shape) - 1) @ torch.tensor(strides) >= 2**31 - 1
    grad = tensors.pop("grad")
    check((*tensors.values(), None), grad=grad)
