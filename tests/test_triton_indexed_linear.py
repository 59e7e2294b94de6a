"""indexed_linear's Triton kernels in the interpreter: what test_ops.py and test_indexed_linear.py leave out.

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
from effens_kernels.ops.indexed_linear import reference
from effens_kernels.ops.indexed_linear import triton as indexed_linear
from effens_kernels.ops.triton_segments import Segments
from effens_kernels.testing import IndexedCase, assert_accurate

NAMES = ("x", "weight", "bias")
# 3 inputs, 4 weights: repeated, out of order, one pair twice; input 1 and weight 2 are used by no group.
X_INDEX, WEIGHT_INDEX = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([3, 3, 0, 1, 3])


def run(inputs, x_index, weight_index, grad, activation=None, need=(True, True, True)):
    """[y, dx, dW, db] by the kernels."""
    x, weight, bias = inputs
    y, z = indexed_linear.fwd(x, weight, x_index, weight_index, bias, activation, saves_preactivation(activation))
    saved = {"nothing": x.new_empty(0), "output": y, "preactivation": z}[ACTIVATIONS[activation].saves]
    return [y, *indexed_linear.bwd(grad, x, weight, x_index, weight_index, saved, activation, *need)]


def composed(inputs, x_index, weight_index, grad, activation, dtype):
    """The same by PyTorch."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    indices = {"x_index": x_index.long(), "weight_index": weight_index.long()}
    y = reference.indexed_linear(*leaves, activation, **indices)
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype))]


def check(inputs, x_index=X_INDEX, weight_index=WEIGHT_INDEX, activation=None, grad=None):
    x, weight, _ = inputs
    if grad is None:
        grad = torch.randn(len(x_index), x.shape[1], weight.shape[1]).to(x.dtype)
    found = run(inputs, x_index, weight_index, grad, activation)
    exact, plain = (
        composed(inputs, x_index, weight_index, grad, activation, dtype) for dtype in (torch.float64, x.dtype)
    )
    for name, ours, *others in zip(("y", *NAMES), found, exact, plain):
        assert_accurate(ours, *others, name, len(x_index) * max(1, *x.shape, *weight.shape))
    assert found[1].stride() == torch.empty_like(x).stride()
    return found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (IndexedCase(4, 5, 7, 9, activation="silu", sources=3), torch.float32),
        (IndexedCase(4, 17, 35, 20, activation="gelu", sources=3), torch.float16),  # more than a tile of each
        (IndexedCase(4, 17, 20, 35, activation="relu", sources=3), torch.bfloat16),
        (IndexedCase(4, 70, 9, 66, activation="tanh", sources=3, bias=False), torch.bfloat16),  # steps within a group
        (IndexedCase(4, 64, 16, 32, activation="tanh", sources=3), torch.float16),  # steps with nothing over
    ],
    ids=str,
)
def test_values(case: IndexedCase, dtype: torch.dtype) -> None:
    check(case.inputs_for(dtype), activation=case.activation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("x_index", "weight_index"),
    [
        ([0, 0, 0, 0], [1, 1, 1, 1]),  # one pair
        ([2, 1, 0], [3, 2, 0]),  # descending
        ([0, 2, 0, 2, 0, 2], [3, 3, 0, 0, 3, 3]),  # taking turns
        ([1], [2]),
    ],
)
def test_indices(x_index: list[int], weight_index: list[int], dtype: torch.dtype) -> None:
    inputs = IndexedCase(4, 3, 5, 6, sources=3).inputs_for()
    found = check(inputs, torch.tensor(x_index, dtype=dtype), torch.tensor(weight_index, dtype=dtype), "relu")
    for grads, used in zip(found[1:], (x_index, weight_index, weight_index)):
        assert [bool(g.any()) for g in grads] == [i in used for i in range(len(grads))]


def test_strides() -> None:
    """Transposed, stepped and expanded views; the bias of all members, which comes expanded; y.sum()'s gradient."""
    x, weight = torch.randn(5, 3, 6).transpose(0, 1), torch.randn(4, 12, 7)[:, ::2].mT
    bias = torch.randn(7).expand(4, -1)
    everywhere = torch.stack([X_INDEX, torch.full_like(X_INDEX, 99)], 1).flatten()[::2]
    check((x, weight, bias), everywhere, WEIGHT_INDEX, "relu", torch.randn(()).expand(5, 5, 7))
    one = torch.tensor([2]).expand(5)
    check(
        (torch.randn(1, 5, 6).expand(3, -1, -1), weight, None),
        one,
        one.int(),
        "tanh",
        torch.randn(7, 5, 5).permute(2, 1, 0),
    )


def test_order_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile is computed once, with more row tiles than one pass over the columns has."""
    monkeypatch.setitem(engine.TILES, "fma", (engine.Tile(16, 16, 16, 4, 2),))
    plans = indexed_linear._plan_fwd, indexed_linear._plan_dgrad, indexed_linear._plan_wgrad
    for plan in plans:
        plan.cache_clear()
    try:
        check(
            (torch.randn(2, 150, 20), torch.randn(2, 35, 20), None), torch.tensor([1, 0]), torch.tensor([1, 1]), "relu"
        )
        check((torch.randn(1, 5, 20), torch.randn(1, 150, 20), None), torch.tensor([0]), torch.tensor([0]), "tanh")
    finally:
        for plan in plans:
            plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_numbers_out_of_range(activation: str | None, dtype: torch.dtype) -> None:
    """Such groups read nothing, give zeros and have no part in any gradient; the others are as without them."""
    limits = torch.iinfo(dtype)
    x_index = torch.tensor([2, -1, 0, 3, 2, 1, limits.max, limits.min, 2], dtype=dtype)
    weight_index = torch.tensor([3, 3, 4, 0, 0, -1, 1, 1, limits.max], dtype=dtype)
    good = torch.tensor([0, 4])
    inputs = IndexedCase(4, 5, 7, 9, sources=3).inputs_for()
    inputs[0][1] = inputs[1][2] = inputs[2][2] = float("nan")  # of no good group
    grad = torch.randn(9, 5, 9)
    found = run(inputs, x_index, weight_index, grad, activation)
    alone = run(inputs, x_index[good], weight_index[good], grad[good], activation)
    assert torch.equal(found[0][good], alone[0])
    bad = torch.ones(9, dtype=torch.bool).index_fill(0, good, False)
    assert not found[0][bad].any()
    for name, ours, expected in zip(NAMES, found[1:], alone[1:]):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("need", [(True, True, True), (False, False, True)])
def test_nothing_to_name(need: tuple[bool, bool, bool]) -> None:
    """Groups without any input or any weight, which the host cannot refuse on a GPU."""
    numbers, grad = torch.tensor([0, 1]), torch.randn(2, 5, 9)
    for sources, members in ((0, 4), (3, 0), (0, 0)):
        inputs = IndexedCase(members, 5, 7, 9, sources=sources).inputs_for()
        found = run(inputs, numbers, numbers, grad, "tanh", need)
        assert not any(t.any() for t in found)


def test_segments() -> None:
    groups, others, bounds = Segments.of(torch.tensor([2, 7, 0, 2, -1, 0]), 4, torch.tensor([5, 4, 3, 2, 1, 0]))
    segments = [(groups[a:b].tolist(), others[a:b].tolist()) for a, b in zip(bounds, bounds[1:])]
    assert segments == [([2, 5], [3, 0]), ([], []), ([0, 3], [5, 2]), ([], [])]


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values with those strides; the pages between them are never touched."""
    storage = values.new_empty(sum((size - 1) * stride for size, stride in zip(values.shape, strides)) + 1)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    ("which", "strides"),
    [
        ("x", (1 << 30, 5, 1)),
        ("x", (8, 1 << 29, 1)),
        ("weight", (1 << 30, 5, 1)),
        ("weight", (8, 1, 1 << 29)),
        ("grad", (1 << 29, 5, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_offsets_beyond_32_bits(which: str, strides: tuple[int, ...]) -> None:
    tensors = {"x": torch.randn(3, 5, 5), "weight": torch.randn(4, 5, 5), "grad": torch.randn(5, 5, 5)}
    tensors = {name: t.half() for name, t in tensors.items()}
    tensors[which] = spread(tensors[which], strides)
    assert (torch.tensor(tensors[which].shape) - 1) @ torch.tensor(strides) >= 2**31 - 1
    check((tensors["x"], tensors["weight"], None), activation="tanh", grad=tensors["grad"])
