"""ragged_linear on the CUDA C++ kernels: members that begin and end anywhere in a tile, and offsets that are wrong."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from common import Runner, derivatives, name_of, run_python
from torch import Tensor

from effens_kernels import _native
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.ragged_linear import reference
from effens_kernels.testing import RaggedCase, assert_accurate, error

RUNNER = Runner("cuda")
if RUNNER.why_not() is not None:
    pytest.skip(RUNNER.why_not(), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {0: "small", 1: "medium", 2: "large"}
TF32_EPS = 2.0**-10
NAMES = ("y", "x", "weight", "bias")
EVERY = (True,) * 3


def integers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=RUNNER.device)


def run(inputs, grad: Tensor, offsets: Tensor, activation=None, tile=-1, tf32=False, need=EVERY) -> dict:
    """Forward and backward through the schemas."""
    x, weight, bias = inputs
    code, save = ACTIVATIONS[activation].code, ACTIVATIONS[activation].saves == "preactivation"
    y, z = _native.cuda_ops.ragged_linear_fwd(x, weight, offsets, bias, code, save, tf32, tile)
    grads = _native.cuda_ops.ragged_linear_bwd(grad, x, weight, offsets, z if save else y, code, *need, tf32, tile)
    return dict(zip(NAMES, (y, *grads)))


def tensors(case: RaggedCase, dtype: torch.dtype, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn((case.batch, case.outputs), generator=generator, dtype=torch.float64)
    return case.inputs_for(dtype, RUNNER.device, seed), grad.to(RUNNER.device, dtype)


def oracle(inputs, grad: Tensor, offsets: Tensor, activation: str | None = None) -> dict:
    return derivatives(reference.ragged_linear, inputs, grad, activation=activation, offsets=offsets)


def assert_right(case: RaggedCase, offsets: Tensor, dtype: torch.dtype, seed: int, **how) -> dict:
    inputs, grad = tensors(case, dtype, seed)
    exact = oracle([t.double() for t in inputs], grad.double(), offsets, case.activation)
    actual = run(inputs, grad, offsets, case.activation, **how)
    if how.get("tf32"):
        assert all(error(actual[name], exact[name]) <= 6 * TF32_EPS for name in NAMES)
        return actual
    composition = oracle(inputs, grad, offsets, case.activation)
    for name in NAMES:
        assert_accurate(actual[name], exact[name], composition[name], name, case.inputs + case.outputs + case.batch)
    return actual


# Members that begin and end with tiles of each size, one row before or behind, that are empty or have all rows.
OFFSETS = {
    "tiles": (0, 32, 64, 128, 160),
    "before": (0, 31, 63, 127, 160),
    "behind": (0, 33, 65, 129, 160),
    "within": (0, 5, 7, 8, 160),
    "empty": (0, 0, 70, 70, 160),
    "first": (0, 160, 160, 160, 160),
    "last": (0, 0, 0, 0, 160),
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_members_that_begin_and_end_anywhere(offsets, dtype, tile, seed):
    case = RaggedCase(4, 160, 40, 24, activation="silu")
    actual = assert_right(case, integers(*offsets), dtype, seed, tile=tile)
    for e in range(4):
        if offsets[e] == offsets[e + 1]:
            assert not actual["weight"][e].any()
            assert not actual["bias"][e].any()


# 130 is two tiles of every size, the second nearly empty; 17 and 33 take unaligned loads, 48 and 96 aligned ones.
SHAPES = [
    RaggedCase(3, 150, 33, 130, activation="silu"),
    RaggedCase(3, 70, 96, 48),
    RaggedCase(3, 60, 160, 24, activation="tanh", x_layout="transposed"),
    RaggedCase(3, 37, 40, 40, activation="gelu", x_layout="inner", weight_layout="inner"),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_tile(case, dtype, tile, seed):
    assert_right(case, integers(0, 11, 34, case.batch), dtype, seed, tile=tile)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tf32(case, seed):
    assert_right(case, integers(0, 11, 34, case.batch), torch.float32, seed, tf32=True)


# The search for a tile's member takes 32 at a time, at up to three levels here.
@pytest.mark.parametrize("members", [1, 29, 30, 31, 63, 64, 65, 1021, 1022, 1023, 1100])
def test_any_number_of_members(members, seed):
    draw = random.Random(seed)
    ends = sorted(draw.randint(0, 300) for _ in range(members - 1))
    assert_right(RaggedCase(members, 300, 3, 2), integers(0, *ends, 300), torch.float32, seed)


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_members_of_one_size_are_grouped_linear(tile, activation, seed):
    """To the bit."""
    case = RaggedCase(3, 105, 70, 20)
    (x, weight, bias), grad = tensors(case, torch.bfloat16, seed)
    actual = run((x, weight, bias), grad, integers(0, 35, 70, 105), activation, tile)
    code, save = ACTIVATIONS[activation].code, activation is not None
    x, grad = x.unflatten(0, (3, 35)), grad.unflatten(0, (3, 35))
    y, z = _native.cuda_ops.grouped_linear_fwd(x, weight, bias, code, save, False, tile)
    grads = _native.cuda_ops.grouped_linear_bwd(grad, x, weight, z if save else y, code, *EVERY, False, tile)
    for value, expected in zip(actual.values(), (y, *grads)):
        assert torch.equal(value, expected.reshape(value.shape))


def test_integers_of_either_size_and_any_stride(seed):
    case = SHAPES[0]
    inputs, grad = tensors(case, torch.float32, seed)
    offsets = integers(0, 50, 50, 150)
    expected = run(inputs, grad, offsets, case.activation)
    for dtype in (torch.int32, torch.int64):
        plain = offsets.to(dtype)
        apart = torch.stack([plain, plain - 9, plain + 99], 1)[:, 0]
        for same in (plain, apart):
            assert all(map(torch.equal, run(inputs, grad, same, case.activation).values(), expected.values()))


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
@pytest.mark.parametrize("activation", [None, "gelu", "tanh"])
def test_rows_of_no_member_make_zeros(tile, activation, seed):
    """Before the first and behind the last; what they hold goes nowhere."""
    case = RaggedCase(3, 300, 20, 17)
    (x, weight, bias), grad = tensors(case, torch.float32, seed)
    first, last = 133, 280
    x[:first], grad[last:] = float("nan"), float("inf")
    actual = run((x, weight, bias), grad, integers(first, 140, 210, last), activation, tile)
    inner = slice(first, last)
    expected = run((x[inner], weight, bias), grad[inner], integers(0, 7, 77, last - first), activation, tile)
    for name in ("y", "x"):
        assert not actual[name][:first].any()
        assert not actual[name][last:].any()
        assert torch.equal(actual[name][inner], expected[name])
    assert all(torch.equal(actual[name], expected[name]) for name in ("weight", "bias"))


@pytest.mark.parametrize("beyond", [71, 2**31 - 1, 2**31, 2**32, 2**32 + 5, 2**63 - 1])
def test_offsets_are_clamped(beyond, seed):
    case = RaggedCase(3, 70, 20, 17)
    inputs, grad = tensors(case, torch.float32, seed)
    expected = run(inputs, grad, integers(0, 40, 70, 70), "silu")
    actual = run(inputs, grad, integers(-beyond, 40, beyond, beyond), "silu")
    assert all(map(torch.equal, actual.values(), expected.values()))
    if beyond < 2**31:
        actual = run(inputs, grad, integers(-beyond, 40, beyond, beyond, dtype=torch.int32), "silu")
        assert all(map(torch.equal, actual.values(), expected.values()))


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as fault:
        return str(fault)
    return ""


def test_offsets_that_decrease_reach_no_other_memory(seed):
    """Results mean nothing then; the emulation may find rows that nobody writes, and nothing worse."""
    draw = random.Random(seed)
    (x, weight, bias), grad = tensors(RaggedCase(40, 200, 5, 4), torch.float32, seed)

    def every_kernel(offsets: Tensor) -> Iterator[str]:
        fwd, bwd = _native.cuda_ops.ragged_linear_fwd, _native.cuda_ops.ragged_linear_bwd
        yield outcome(lambda: fwd(x, weight, offsets, bias, 0, False, False))
        for need in (True, False, False), (False, True, True):
            yield outcome(lambda: bwd(grad, x, weight, offsets, x[:0], 0, *need, False))  # noqa: B023

    for _ in range(10):
        values = [draw.choice([draw.randint(-9, 210), draw.randint(-(2**63), 2**63 - 1)]) for _ in range(41)]
        for fault in every_kernel(integers(*values)):
            assert not fault or (RUNNER.emulated and "has not been written" in fault)


def test_nothing_to_multiply():
    for members, rows, inputs, outputs in [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (0, 0, 0, 0)]:
        x, weight = (torch.ones(size, device=RUNNER.device) for size in ((rows, inputs), (members, outputs, inputs)))
        bias, grad = (torch.ones(n, outputs, device=RUNNER.device) for n in (members, rows))
        actual = run((x, weight, bias), grad, integers(*[0] * members, rows))
        assert torch.equal(actual["y"], torch.full((rows, outputs), float(members > 0 and inputs == 0)).to(x.device))
        assert not actual["x"].any()
        assert actual["weight"].shape == weight.shape
        assert not actual["weight"].any()
        assert actual["bias"].sum() == (rows * outputs if members else 0)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_only_the_gradients_asked_for(activation, seed):
    case = RaggedCase(3, 50, 33, 18)
    inputs, grad = tensors(case, torch.float32, seed)
    offsets = integers(0, 11, 34, 50)
    every = run(inputs, grad, offsets, activation)
    for need in itertools.product((False, True), repeat=3):
        some = run(inputs, grad, offsets, activation, need=need)
        for name, wanted in zip(NAMES[1:], need):
            assert torch.equal(some[name], every[name]) if wanted else some[name].numel() == 0, (need, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_values_that_are_not_finite_stay_with_their_member(tile, dtype, seed):
    case = RaggedCase(4, 90, 33, 18)
    (x, weight, bias), grad = tensors(case, dtype, seed)
    offsets = integers(0, 30, 41, 41, 90)
    x[30:41], weight[2], bias[2] = float("nan"), float("nan"), float("nan")
    grad[7, 4] = float("inf")
    actual = run((x, weight, bias), grad, offsets, tile=tile)
    expected = oracle([t.double() for t in (x, weight, bias)], grad.double(), offsets)
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert torch.equal(value.isfinite(), expected[name].isfinite()), name


def test_rows_further_apart_than_32_bits_reach(seed):
    case = RaggedCase(2, 4, 24, 5)
    inputs, grad = tensors(case, torch.bfloat16, seed)
    offsets = integers(0, 3, 4)
    storage = torch.empty(2**32 + 2**31, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    far = storage.as_strided(inputs[0].shape, (2**30 + 2**29 + 8, 1)).copy_(inputs[0])
    near = run(inputs, grad, offsets)
    assert all(map(torch.equal, run((far, *inputs[1:]), grad, offsets).values(), near.values()))


def test_bad_calls_of_the_schema():
    x, weight, y = (torch.zeros(size, device=RUNNER.device) for size in ((3, 4), (2, 6, 4), (3, 6)))
    offsets = integers(0, 1, 3)
    how = None, 0, False, False
    for arguments, words in [
        ((x, weight[0], offsets, *how), "x should be"),
        ((x[None], weight, offsets, *how), "x should be"),
        ((x[..., 1:], weight, offsets, *how), "x does not fit"),
        ((x, weight.half(), offsets, *how), "x does not fit"),
        ((x, weight, offsets[1:], *how), "offsets should have 3 integers"),
        ((x, weight, offsets.float(), *how), "offsets should have 3 integers"),
        ((x, weight, offsets, x[0], 0, False, False), "bias does not fit"),
        ((x, weight, offsets, None, 9, False, False), "unknown activation code 9"),
        ((x, weight, offsets, *how, 3), "tile should be"),
        ((x.double(), weight.double(), offsets, *how), "take float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _native.cuda_ops.ragged_linear_fwd(*arguments)
    for arguments, words in [
        ((y[1:], x, weight, offsets, y, 1), "grad does not fit"),
        ((y, x, weight, offsets, y[..., 1:], 1), "saved does not fit"),
        ((y, x, weight, offsets[1:], y, 1), "offsets should have 3 integers"),
        ((y, x, weight, offsets, y, -1), "unknown activation code -1"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _native.cuda_ops.ragged_linear_bwd(*arguments, *EVERY, False)


@pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")
def test_results_do_not_depend_on_the_order_of_threads(seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256()\n"
        "sizes, offsets = ((130, 36), (4, 34, 36), (4, 34), (130, 34)), torch.tensor([0, 9, 70, 70, 130])\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x, w, b, g = (torch.randn(size).to(dtype) for size in sizes)\n"
        "    y, z = _native.cuda_ops.ragged_linear_fwd(x, w, offsets, b, 2, True, False, 1)\n"
        "    need = True, True, True, False, 1\n"
        "    for t in (y, z, *_native.cuda_ops.ragged_linear_bwd(g, x, w, offsets, z, 2, *need)):\n"
        "        digest.update(t.float().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    orders = "forward", "reverse", "1"
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=order) for order in orders]
    assert all(r.returncode == 0 for r in runs), runs
    assert len({r.stdout for r in runs}) == 1
