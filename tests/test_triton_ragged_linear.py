"""ragged_linear's Triton kernels in the interpreter: what test_ops.py and test_ragged_linear.py leave out.

There, as here, errors are measured against float64.  Tiles are small, since a program takes a tenth of a second.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run Triton kernels on CPU tensors", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from effens_kernels.ops import triton_engine as engine
from effens_kernels.ops import triton_segments as segments
from effens_kernels.ops._activations import ACTIVATIONS, saves_preactivation
from effens_kernels.ops.ragged_linear import reference
from effens_kernels.ops.ragged_linear import triton as ragged_linear
from effens_kernels.testing import RaggedCase, assert_accurate

NAMES = ("x", "weight", "bias")


def run(inputs, offsets, grad, activation=None, need=(True, True, True)):
    """[y, dx, dW, db] by the kernels."""
    x, weight, bias = inputs
    y, z = ragged_linear.fwd(x, weight, offsets, bias, activation, saves_preactivation(activation))
    saved = {"nothing": x.new_empty(0), "output": y, "preactivation": z}[ACTIVATIONS[activation].saves]
    return [y, *ragged_linear.bwd(grad, x, weight, offsets, saved, activation, *need)]


def composed(inputs, offsets, grad, activation, dtype):
    """The same by PyTorch."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    y = reference.ragged_linear(*leaves, activation, offsets=offsets)
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype), materialize_grads=True)]


def check(inputs, offsets, activation=None, grad=None):
    x, weight, _ = inputs
    grad = torch.randn(len(x), weight.shape[1]).to(x.dtype) if grad is None else grad
    found = run(inputs, offsets, grad, activation)
    exact, plain = (composed(inputs, offsets, grad, activation, dtype) for dtype in (torch.float64, x.dtype))
    for name, ours, *others in zip(("y", *NAMES), found, exact, plain):
        assert_accurate(ours, *others, name, max(1, *x.shape, *weight.shape))
    assert found[1].stride() == torch.empty_like(x).stride()
    return found


def ends_of(*rows: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(rows)], dtype=dtype)


@pytest.mark.parametrize(
    ("rows", "activation", "dtype"),
    [
        ((5, 0, 2), "silu", torch.float32),
        ((17, 33, 1), "gelu", torch.float16),  # more than a tile of a member
        ((0, 40, 0), "relu", torch.bfloat16),
        ((16, 32, 0, 48), "tanh", torch.float16),  # with tiles that are full
        ((70, 3), "tanh", torch.bfloat16),
        ((15, 1, 16, 17, 31), None, torch.float32),
    ],
    ids=str,
)
def test_values(rows: tuple[int, ...], activation: str | None, dtype: torch.dtype) -> None:
    found = check(RaggedCase(len(rows), sum(rows), 35, 20).inputs_for(dtype), ends_of(*rows), activation)
    assert [bool(g.any()) for g in found[2]] == [count > 0 for count in rows]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_strides(dtype: torch.dtype) -> None:
    """Transposed and stepped views; the bias of all members, which comes expanded; y.sum()'s gradient."""
    x, weight = torch.randn(6, 11).T, torch.randn(3, 12, 7)[:, ::2].mT
    offsets = torch.stack([ends_of(4, 0, 7, dtype=dtype), torch.full((4,), 99, dtype=dtype)], 1).flatten()[::2]
    check((x, weight, torch.randn(7).expand(3, -1)), offsets, "relu", torch.randn(()).expand(11, 7))
    check((torch.randn(11, 13)[:, 1::2], weight, None), offsets, "tanh", torch.randn(7, 11).T)


# ------------------------------------------------------------------------------------------- which rows a tile has


@triton.jit
def rows_of_tile_kernel(offsets, result, rows, members, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr):
    tile = tl.program_id(0)
    member, first, count = segments.rows_of_tile(offsets, tile, rows, members, BLOCK_M, AT_ONCE)
    tl.store(result + 3 * tile, member)
    tl.store(result + 3 * tile + 1, first)
    tl.store(result + 3 * tile + 2, count)


def tiles_of(offsets: torch.Tensor, rows: int, block: int) -> list[tuple[int, int, int]]:
    """(member, first row, number of rows) of each tile that has any."""
    members = len(offsets) - 1
    result = torch.full((ragged_linear._row_tiles(rows, members, block), 3), -99)
    rows_of_tile_kernel[(len(result),)](offsets, result, rows, members, BLOCK_M=block, AT_ONCE=4)
    assert (result[:, 0] >= -1).all()
    assert (result[:, 0] <= members).all()
    return [tuple(tile) for tile in result.tolist() if tile[2] > 0]


def some_offsets() -> list[tuple[list[int], int]]:
    found = [(list(ends), n) for n in (0, 3, 8) for ends in itertools.combinations_with_replacement(range(n + 1), 2)]
    return found + [([0, *ends, 9], 9) for ends in itertools.combinations_with_replacement((0, 3, 4, 9), 3)]


def test_each_row_is_of_one_tile_and_of_its_member() -> None:
    """All offsets of one member, with rows of none before and after it, and some of four members; in tiles of 4."""
    for offsets, rows in some_offsets():
        covered = []
        for member, first, count in sorted(tiles_of(torch.tensor(offsets), rows, 4), key=lambda tile: tile[1]):
            assert count <= 4
            covered += range(first, first + count)
            begin = 0 if member < 0 else offsets[member]
            end = rows if member == len(offsets) - 1 else offsets[member + 1]
            assert begin <= first
            assert first + count <= end
        assert covered == list(range(rows)), offsets


def test_more_members_than_are_looked_at_at_once() -> None:
    sizes = torch.randint(0, 7, (23,)).tolist()
    offsets = ends_of(*sizes, dtype=torch.int32)
    rows_of = [0] * 23
    for member, _, count in tiles_of(offsets, sum(sizes), 4):
        rows_of[member] += count
    assert rows_of == sizes


# ------------------------------------------------------------------------------------------- offsets of any value


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("ends", [[3, 5, 9], [0, 4, 16], [4, 9, 20], [-7, 2, 9], [0, 0, 0], [20, 20, 20]], ids=str)
def test_rows_of_no_member_are_zero(ends: list[int], activation: str | None) -> None:
    """And have no part in any gradient; the others are as by the clamped offsets."""
    inputs = RaggedCase(2, 20, 7, 9).inputs_for()
    offsets = torch.tensor(ends)
    found = check(inputs, offsets.clamp(0, 20), activation, grad := torch.randn(20, 9))
    for ours, expected in zip(run(inputs, offsets, grad, activation), found):
        assert torch.equal(ours, expected)
    first, last = max(0, ends[0]), min(20, ends[-1])
    for rows in found[:2]:
        assert not rows[:first].any()
        assert not rows[last:].any()
        assert rows[first:last].any() or first >= last


def test_rows_of_no_member_are_not_read() -> None:
    """They may be NaN, as what a caller has not filled; and so may weights of members without rows."""
    x, weight, bias = RaggedCase(3, 20, 7, 9).inputs_for()
    grad, offsets = torch.randn(20, 9), torch.tensor([2, 7, 7, 15])
    for t in (x, grad):
        t[:2] = t[15:] = float("nan")
    weight[1] = bias[1] = float("nan")
    assert not any(t.isnan().any() for t in run((x, weight, bias), offsets, grad, "tanh"))


@pytest.mark.parametrize("ends", [[0, 9, 3, 20], [20, 10, 5, 0], [2**40, -(2**40), 2**62, 7]], ids=str)
def test_offsets_that_decrease_read_and_write_nothing_beyond_the_tensors(ends: list[int]) -> None:
    """Results of such a call mean nothing, but what surrounds the tensors stays as it is, and is not seen."""
    nan, offsets = float("nan"), torch.tensor(ends)

    def surrounded(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(t, nan), t, torch.full_like(t, nan)])[len(t) : 2 * len(t)]

    x, weight, bias = map(surrounded, RaggedCase(3, 20, 7, 9).inputs_for())
    y, _ = ragged_linear.fwd(x, weight, offsets, bias, None, False)
    grads = ragged_linear.bwd(surrounded(torch.randn(20, 9)), x, weight, offsets, y, None, True, True, True)
    assert not any(t.isnan().any() for t in grads[1:])


@pytest.mark.parametrize("rows", [0, 20])
def test_no_members(rows: int) -> None:
    inputs = RaggedCase(0, rows, 7, 9).inputs_for()
    y, dx, dw, db = run(inputs, torch.tensor([0]), torch.randn(rows, 9), "tanh")
    assert not any(t.any() for t in (y, dx, dw, db))


# ------------------------------------------------------------------------------------------------------- indices


def test_order_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile is computed once, with more row tiles than one pass over the columns has."""
    monkeypatch.setitem(engine.TILES, "fma", (engine.Tile(16, 16, 16, 4, 2),))
    plans = ragged_linear._plan_fwd, ragged_linear._plan_dgrad, ragged_linear._plan_wgrad
    for plan in plans:
        plan.cache_clear()
    try:
        check((torch.randn(151, 20), torch.randn(2, 35, 20), None), ends_of(130, 21), "relu")
        check((torch.randn(5, 20), torch.randn(2, 150, 20), None), ends_of(2, 3), "tanh")
    finally:
        for plan in plans:
            plan.cache_clear()


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values with those strides; the pages between them are never touched."""
    storage = values.new_empty(sum((size - 1) * stride for size, stride in zip(values.shape, strides)) + 1)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    ("which", "strides"),
    [
        ("x", (1 << 28, 1)),
        ("x", (1, 1 << 29)),
        ("weight", (1 << 30, 5, 1)),
        ("weight", (8, 1, 1 << 29)),
        ("grad", (1 << 28, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_offsets_beyond_32_bits(which: str, strides: tuple[int, ...]) -> None:
    tensors = {"x": torch.randn(9, 5), "weight": torch.randn(3, 5, 5), "grad": torch.randn(9, 5)}
    tensors = {name: t.half() for name, t in tensors.items()}
    tensors[which] = spread(tensors[which], strides)
    assert (torch.tensor(tensors[which].shape) - 1) @ torch.tensor(strides) >= 2**31 - 1
    check((tensors["x"], tensors["weight"], None), ends_of(4, 0, 5), "tanh", tensors["grad"])
