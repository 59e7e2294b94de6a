"""The Triton building blocks that the ops compose, and the one table that sizes their tiles.

    contract    acc[m, n] = sum_k a[m, k] b[n, k]     every y, dx and dW is one
    multiply    one step of contract's loop           for loops that run over members as well
    row_sums    sum_k a[m, k]                         db, by programs of their own beside those of dW
    add_parts   sum_p parts[p, j]                     results that several programs have partial sums of

An *operand* is a `[lines, BLOCK_K]` tile that advances along the reduction: `lines()` says which lines of which tensor
(rows of the batch, columns of the product), `operand()` adds the reduction.  Either may run over members as well:
with FOLD, index i means member i // group and position i % group, so that many small products become one.
A *loader* turns an operand into values, and may transform them on the way:

    load(operand, k, size, group, TRANSFORM, FOLD, WIDE, EVEN_K, BLOCK_K) -> [lines, BLOCK_K]

`load_tile` only loads; `load_gradient` takes a pair of operands and multiplies by an activation's slope; `load_scaled`
and `load_scaled_gradient` multiply by one more operand, a scale along the reduction (`member_lines`).  A new transform
(a mix of templates) is a new loader over `load_tile`.  Triton cannot keep functions or strings in tuples, so a loader
travels as an argument of its own, with its one compile-time choice TRANSFORM beside it.
What happens to the float32 result (bias, `activate`, scale, `store_tile`) is the op's epilogue.

Members and tiles are reached by 64-bit arithmetic, places within a tile by 32-bit offsets, which halves the registers
that addresses take.  WIDE makes those 64-bit too, for strides that need it (`Layout`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._precision import uses_tf32

# The interpreter computes bfloat16 products wrongly, without a word, and cuts where a GPU rounds: there every tile is
# float32 from load to store, and `narrow` rounds.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_GROUP = tl.constexpr(8)  # row tiles that share a pass over the columns, so that both stay in L2

# ------------------------------------------------------------------------------------------------ device: indices


@triton.jit
def program_tile(rows, column_tiles, BLOCK_M: tl.constexpr):
    """(member, row tile, column tile) of this program: members slowest, then groups of row tiles, rows fastest."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    member = program // (row_tiles * column_tiles)
    program = program % (row_tiles * column_tiles)
    first = program // (_GROUP * column_tiles) * _GROUP
    height = tl.minimum(row_tiles - first, _GROUP)
    program = program % (_GROUP * column_tiles)
    return member.to(tl.int64), first + program % height, program // height


@triton.jit
def folded_offsets(index, group, stride, group_stride, WIDE: tl.constexpr):
    """Offsets of indices that run over members: member index // group, position index % group."""
    member = index // group
    position = index % group
    if WIDE:
        member = member.to(tl.int64)
        position = position.to(tl.int64)
    return member * group_stride + position * stride


@triton.jit
def lines(
    pointer, tile, size, stride, group, group_stride, FOLD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """(pointer, offsets, valid) of the lines of one tile along a dimension of `size` lines; the pointer has moved."""
    local = tl.arange(0, BLOCK)
    index = tile * BLOCK + local
    if FOLD:
        offsets = folded_offsets(index, group, stride, group_stride, WIDE)
    else:
        pointer += tl.cast(tile * BLOCK, tl.int64) * stride
        if WIDE:
            local = local.to(tl.int64)
        offsets = local * stride
    return pointer, offsets, index < size


@triton.jit
def operand(which, stride, group_stride, FOLD: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `lines()` found, with `stride` (and with FOLD `group_stride`) along the reduction."""
    pointer, offsets, valid = which
    offsets = offsets[:, None]
    if not FOLD:
        along = tl.arange(0, BLOCK_K)
        if WIDE:
            along = along.to(tl.int64)
        offsets = offsets + (along * stride)[None, :]
    return pointer, offsets, valid[:, None], stride, group_stride


@triton.jit
def of_member(source, member, stride):
    """The operand `source` moved to a member."""
    pointer, offsets, valid, along, group_stride = source
    return pointer + tl.cast(member, tl.int64) * stride, offsets, valid, along, group_stride


@triton.jit
def member_lines(pointer, member, m, rows, group, stride, FOLD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`lines()` of a tensor that is the same for all rows of a member: one line, or with FOLD (rows run over members,
    `group` each) that of each row's member."""
    if FOLD:
        return lines(pointer, m, rows, 0, group, stride, True, WIDE, BLOCK)
    else:
        return lines(pointer + member * stride, 0, 1, 0, 1, 0, False, WIDE, 1)


# ------------------------------------------------------------------------------------------------ device: loaders


@triton.jit
def load_tile(
    source, k, size, group, TRANSFORM: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The operand `source` from reduction index k on, zero beyond its lines and beyond `size`."""
    pointer, offsets, valid, stride, group_stride = source
    index = k + tl.arange(0, BLOCK_K)
    if FOLD:
        offsets = offsets + folded_offsets(index, group, stride, group_stride, WIDE)[None, :]
    else:
        pointer += tl.cast(k, tl.int64) * stride
    if not EVEN_K:
        valid = valid & (index < size)[None, :]
    tile = tl.load(pointer + offsets, mask=valid, other=0.0)
    if _INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_gradient(
    sources, k, size, group, TRANSFORM: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad * slope(saved): the gradient before activation TRANSFORM, from the gradient after it."""
    grad, saved = sources
    tile = load_tile(grad, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K)
    if TRANSFORM is not None:
        by = load_tile(saved, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K)
        tile = through_activation(tile, by, TRANSFORM)
    return tile


@triton.jit
def load_scaled(
    sources, k, size, group, TRANSFORM: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """source * scale, computed in float32 and rounded to the dtype."""
    source, scale = sources
    tile = load_tile(source, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K)
    by = load_tile(scale, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K)
    return (tile.to(tl.float32) * by.to(tl.float32)).to(tile.dtype)


@triton.jit
def load_scaled_gradient(
    sources, k, size, group, TRANSFORM: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad * slope(saved) * scale, rounded to the dtype once."""
    grad, saved, scale = sources
    tile = load_tile(grad, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K)
    by = load_tile(scale, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K).to(tl.float32)
    g = tile.to(tl.float32)
    if TRANSFORM is not None:
        g = through_activation(g, load_tile(saved, k, size, group, None, FOLD, WIDE, EVEN_K, BLOCK_K), TRANSFORM)
    return (g * by).to(tile.dtype)


# ------------------------------------------------------------------------------------------------ device: sums


@triton.jit
def contract(
    load_a, a, A: tl.constexpr, load_b, b, B: tl.constexpr, size, group, FOLD: tl.constexpr, WIDE: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[m, n] = sum over k < size of a[m, k] b[n, k], in float32; A and B are the loaders' TRANSFORMs."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, size, BLOCK_K):
        acc = multiply(load_a, a, A, load_b, b, B, acc, k, size, group, FOLD, WIDE, EVEN_K, PRECISION, BLOCK_K)
    return acc


@triton.jit
def multiply(
    load_a, a, A: tl.constexpr, load_b, b, B: tl.constexpr, acc, k, size, group, FOLD: tl.constexpr,
    WIDE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc plus the BLOCK_K terms of `contract` from reduction index k on."""
    a_tile = load_a(a, k, size, group, A, FOLD, WIDE, EVEN_K, BLOCK_K)
    b_tile = load_b(b, k, size, group, B, FOLD, WIDE, EVEN_K, BLOCK_K)
    return tl.dot(a_tile, tl.trans(b_tile), acc, input_precision=PRECISION)


@triton.jit
def row_sums(
    load_a, a, A: tl.constexpr, size, group, FOLD: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum over k < size of a[m, k], in float32.

    Inside `contract` the same sums would cost the tensor cores a third of their time (shuffles and barriers in
    the loop); programs of their own read `a` once more, from L2, and leave that loop alone.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, size, BLOCK_K):
        acc += load_a(a, k, size, group, A, FOLD, WIDE, EVEN_K, BLOCK_K).to(tl.float32)
    return tl.sum(acc, 1)


@triton.jit
def add_parts(parts, result, block, size, count, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr = 8):
    """result[j] = sum over p < count of the contiguous parts[p, j], for one block of j < size, in a fixed order."""
    j = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = tl.arange(0, AT_ONCE)  # so many loads are on their way at once
    acc = tl.zeros((AT_ONCE, BLOCK), tl.float32)
    for first in range(0, count, AT_ONCE):
        p = first + some
        offsets = p.to(tl.int64)[:, None] * size + j[None, :]
        acc += tl.load(parts + offsets, mask=(p < count)[:, None] & (j < size)[None, :], other=0.0)
    tl.store(result + j, narrow(tl.sum(acc, 0), result.dtype.element_ty), mask=j < size)


@triton.jit
def load_columns(which, n, columns, stride, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of tile n of what `member_lines()` found, in float32, to go with an accumulator's rows."""
    pointer, down, row_valid = which
    pointer, along, column_valid = lines(pointer, n, columns, stride, 1, 0, False, WIDE, BLOCK_N)
    valid = row_valid[:, None] & column_valid[None, :]
    return tl.load(pointer + (down[:, None] + along[None, :]), mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_line(pointer, tile, size, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a line of `size` elements, in float32, to go with an accumulator."""
    pointer, offsets, valid = lines(pointer, tile, size, stride, 1, 0, False, WIDE, BLOCK)
    return tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def store_line(pointer, values, tile, size, BLOCK: tl.constexpr):
    """Store float32 values, in the tensor's dtype, as one tile of a contiguous line of `size` elements."""
    pointer, offsets, valid = lines(pointer, tile, size, 1, 1, 0, False, False, BLOCK)
    tl.store(pointer + offsets, narrow(values, pointer.dtype.element_ty), mask=valid)


@triton.jit
def store_tile(
    pointer, acc, m, rows, row_stride, n, columns, stride, group, group_stride, FOLD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store acc, in the tensor's dtype, as tile (m, n) of [rows, columns]; with FOLD the columns run over members."""
    pointer, down, row_valid = lines(pointer, m, rows, row_stride, 1, 0, False, WIDE, BLOCK_M)
    pointer, along, column_valid = lines(pointer, n, columns, stride, group, group_stride, FOLD, WIDE, BLOCK_N)
    offsets = down[:, None] + along[None, :]
    valid = row_valid[:, None] & column_valid[None, :]
    tl.store(pointer + offsets, narrow(acc, pointer.dtype.element_ty), mask=valid)


@triton.jit
def narrow(acc, dtype: tl.constexpr):
    """A float32 tile in `dtype`, rounded to nearest."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = acc.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        acc = tl.where(acc == acc, bits.to(tl.float32, bitcast=True), acc)
    return acc.to(dtype)


# ------------------------------------------------------------------------------------------------ device: activations


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) of a float32 tile, as `_activations` defines it (relu keeps NaN, as torch does)."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    if ACTIVATION == "tanh":
        z = _tanh(z)
    return z


@triton.jit
def through_activation(grad, saved, ACTIVATION: tl.constexpr):
    """grad * act'(z) in grad's dtype, from what the activation saves (its output, or z)."""
    if ACTIVATION == "relu":
        return tl.where(saved <= 0, 0.0, grad).to(grad.dtype)
    g, s = grad.to(tl.float32), saved.to(tl.float32)
    if ACTIVATION == "gelu":
        bell = tl.exp(-0.5 * s * s)
        if saved.dtype == tl.float32:
            below = 0.5 + 0.5 * tl.erf(s * 0.7071067811865476)
        else:
            below = _normal_cdf(s, bell)
        g = g * (below + s * (bell * 0.3989422804014327))
    if ACTIVATION == "silu":
        p = 1 / (1 + tl.exp(-s))
        g = g * (p * (1 + s * (1 - p)))
    if ACTIVATION == "tanh":
        g = g * (1 - s * s)
    return g.to(grad.dtype)


@triton.jit
def _normal_cdf(z, bell):
    """P(N(0, 1) < z) to 1e-7, given bell = exp(-z^2 / 2): far below what a 16-bit z resolves, and half the cost of
    erf, which would be most of a backward pass (Abramowitz and Stegun 1964, formula 7.1.26)."""
    t = 1 / (1 + 0.23164190 * tl.abs(z))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
    return tl.where(z < 0, tail, 1 - tail)


@triton.jit
def _tanh(z):
    t, q = tl.exp(-2 * tl.abs(z)), z * z
    far = (1 - t) / (1 + t)  # cancels near zero, where the series is exact to float32
    near = z * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(q < 0.0625, near, tl.where(z < 0, -far, far))


# ------------------------------------------------------------------------------------------------ host: tile sizes


class Tile(NamedTuple):
    """What one program computes: BLOCK_M x BLOCK_N results, BLOCK_K of the reduction at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Block(NamedTuple):
    """What one program of `add_parts` adds up."""

    BLOCK: int = 256
    num_warps: int = 4
    num_stages: int = 1


# Largest first.  "tensor": tensor cores, BLOCK_K in 32-bit words (16-bit types take twice that; they need K >= 16).
# "fma": float32 without TF32, computed by ordinary multiply-adds, whose operands live in registers.
TILES: dict[str, tuple[Tile, ...]] = {
    "tensor": (
        Tile(128, 256, 32, 8, 4),
        Tile(128, 128, 32, 8, 4),
        Tile(64, 64, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(64, 16, 32, 4, 4),
        Tile(16, 64, 32, 4, 4),
        Tile(16, 16, 32, 4, 4),
    ),
    "fma": (
        Tile(128, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(64, 16, 32, 4, 3),
        Tile(16, 64, 32, 4, 3),
        Tile(16, 16, 32, 4, 3),
    ),
}
# Besides, for programs with a second accumulator, which are limited by registers.
TWICE: dict[str, tuple[Tile, ...]] = {
    "tensor": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    "fma": (Tile(64, 64, 16, 8, 3),),
}


class Device(NamedTuple):
    """What the choice of a tile knows of a device."""

    fill: int  # programs that keep it busy
    area: int  # largest BLOCK_M * BLOCK_N
    memory: int  # bytes of shared memory that the stages of one program may take
    fragments: bool  # tensor cores take operands from registers (mma.sync), not from shared memory


# By compute capability; one that is not here takes the last row before it.
_INTERPRETER = 0
DEVICES = {
    _INTERPRETER: Device(4, 64 * 64, 96 << 10, False),  # few programs: tens of milliseconds each
    75: Device(40, 64 * 64, 60 << 10, True),
    80: Device(108, 128 * 128, 160 << 10, True),
    86: Device(84, 128 * 128, 96 << 10, True),
    90: Device(132, 128 * 256, 224 << 10, False),
    100: Device(148, 128 * 256, 224 << 10, False),
    120: Device(170, 128 * 128, 96 << 10, True),
}


class Layout(NamedTuple):
    """What the strides of all tensors of a launch, together, allow."""

    aligned: bool  # every row starts a multiple of 16 elements into its tensor: 16-byte loads and stores
    wide: bool  # 32-bit offsets within a tile could overflow

    @staticmethod
    def of(inputs: int, outputs: int, *strides: tuple[int, ...]) -> Layout:
        """From the feature sizes (the strides of contiguous results) and (member, row, feature) strides."""
        far, near = 0, inputs | outputs
        for member, row, feature in strides:
            far |= member
            near |= (row if row != 1 else 0) | (feature if feature != 1 else 0)
        # A tile spans 256 rows and 128 steps of the reduction at most: (256 + 128) * 2**22 < 2**31.
        return Layout((far | near) & 15 == 0, near >= 1 << 22)


def _device(capability: int) -> Device:
    return DEVICES[max(known for known in DEVICES if known <= capability)]


def fill(capability: int) -> int:
    """How many programs keep the device busy."""
    return _device(capability).fill


def choose_tile(
    members: int, rows: int, columns: int, dtype: torch.dtype, precision: str, capability: int, layout: Layout,
    activation: bool = False, slope: bool = False, scales: int = 0, accumulators: int = 1, indirect: bool = False,
) -> Tile:  # fmt: skip
    """The tile for `members` products of [rows, columns], with an `activation` on results or its `slope` on operand a.

    `scales` of operand a: 0 for none, 1 along the reduction, 2 along its rows as well.  `indirect`: numbers that the
    loop loads say where operands are.

    The first (largest) row of the table that is no wider than the product, rounded up to a power of two, either
    way, and still makes enough programs to fill the GPU; if none does, the smallest, for the most programs.
    What takes registers makes tiles smaller: an activation, its slope (with the second tensor that it loads), scales by
    row (likewise), a second accumulator, rows that are not aligned (one address per element, not per 16 bytes), 64-bit
    offsets.
    """
    kind = "fma" if dtype == torch.float32 and precision == "ieee" else "tensor"
    device = _device(capability)
    area = device.area
    tensors = 1 + slope + (scales == 2)  # that operand a is made of
    if activation or tensors > 1:
        area = min(area, 64 * 64 if tensors > 1 and device.fragments else 128 * 128)
    if accumulators > 1:
        area = min(area, 64 * 64 if kind == "fma" or (slope and device.fragments) else 64 * 128)
    if not layout.aligned:
        area = min(area, 32 * 32 if scales == 2 else 64 * 64)
    if layout.wide:
        area = min(area, 32 * 32)
    table = TWICE[kind] + TILES[kind] if accumulators > 1 else TILES[kind]
    tall, wide = (max(16, triton.next_power_of_2(size)) for size in (rows, columns))
    for tile in table:
        if tile.BLOCK_M > tall or tile.BLOCK_N > wide or tile.BLOCK_M * tile.BLOCK_N > area:
            continue
        if members * triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N) >= device.fill:
            break
    else:
        tile = table[-1]

    block_k = tile.BLOCK_K * (4 // dtype.itemsize)
    if kind == "tensor" and (not layout.aligned or (device.fragments and tile.BLOCK_M * tile.BLOCK_N >= 64 * 64)):
        block_k //= 2  # fewer addresses, fewer fragments
    stage = (tensors * tile.BLOCK_M + tile.BLOCK_N) * block_k * dtype.itemsize
    stages = min(tile.num_stages, 3 if scales and device.fragments else 4, device.memory // stage)
    if indirect:  # half of the stages are the numbers', and no tile takes memory in these: 5 are 3, 7 would spill
        stages = min(2 * stages - 1, 5, device.memory // stage + 1)
    return tile._replace(BLOCK_K=block_k, num_stages=max(2, stages))


# ------------------------------------------------------------------------------------------------ host: launch


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """80, 90, ... of a GPU; `_INTERPRETER` for the interpreter's CPU tensors."""
    return _capability(device.index) if device.type == "cuda" else _INTERPRETER


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: "tf32" where the user allows PyTorch's own matmul that, else "ieee"."""
    return "tf32" if uses_tf32(dtype) else "ieee"


class Plan(NamedTuple):
    """A launch but for its tensors: a pure function of shapes, strides and device, worked out once for each."""

    kernel: triton.JITFunction
    programs: int
    scalars: tuple[int, ...]  # the arguments after the tensors
    switches: dict[str, object]

    @staticmethod
    def of(
        kernel: triton.JITFunction, programs: int, scalars: tuple[int, ...], tile: Tile | Block, **switches: object
    ) -> Plan:
        if programs >= 2**31:
            raise ValueError(f"{kernel.fn.__name__}: {programs} tiles are more than one launch can hold (2**31 - 1)")
        # Named because its default changes in Triton 3.10.
        return Plan(kernel, programs, scalars, {**switches, **tile._asdict(), "enable_fp_fusion": True})


def launch(plan: Plan, *tensors: Tensor | None) -> None:
    """Run `plan` on the device of its tensors, whichever device is current."""
    first = next(t for t in tensors if t is not None)
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            plan.kernel[(plan.programs,)](*tensors, *plan.scalars, **plan.switches)
    else:
        plan.kernel[(plan.programs,)](*tensors, *plan.scalars, **plan.switches)
