"""indexed_linear on the CUDA C++ kernels: every tile and type, lists of groups, and numbers that name nothing."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from common import Runner, derivatives, name_of, run_python
from torch import Tensor

from effens_kernels import _native
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.indexed_linear import reference
from effens_kernels.testing import IndexedCase, assert_accurate, error

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


def run(inputs, grad: Tensor, x_index, weight_index, activation=None, tile=-1, tf32=False, need=EVERY) -> dict:
    """Forward and backward through the schemas."""
    x, weight, bias = inputs
    code, save = ACTIVATIONS[activation].code, ACTIVATIONS[activation].saves == "preactivation"
    index = x_index, weight_index
    y, z = _native.cuda_ops.indexed_linear_fwd(x, weight, *index, bias, code, save, tf32, tile)
    grads = _native.cuda_ops.indexed_linear_bwd(grad, x, weight, *index, z if save else y, code, *need, tf32, tile)
    return dict(zip(NAMES, (y, *grads)))


def tensors(case: IndexedCase, dtype: torch.dtype, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn((case.groups, case.batch, case.outputs), generator=generator, dtype=torch.float64)
    return case.inputs_for(dtype, RUNNER.device, seed), grad.to(RUNNER.device, dtype)


def oracle(inputs, grad: Tensor, x_index: Tensor, weight_index: Tensor, activation: str | None = None) -> dict:
    options = {"activation": activation, "x_index": x_index, "weight_index": weight_index}
    return derivatives(reference.indexed_linear, inputs, grad, **options)


def assert_right(
    case: IndexedCase, x_index: Tensor, weight_index: Tensor, dtype: torch.dtype, seed: int, **how
) -> dict:
    inputs, grad = tensors(case, dtype, seed)
    index = x_index, weight_index
    exact = oracle([t.double() for t in inputs], grad.double(), *index, case.activation)
    actual = run(inputs, grad, *index, case.activation, **how)
    if how.get("tf32"):
        assert all(error(actual[name], exact[name]) <= 6 * TF32_EPS for name in NAMES)
        return actual
    composition = oracle(inputs, grad, *index, case.activation)
    for name in NAMES:
        assert_accurate(actual[name], exact[name], composition[name], name, case.inputs + case.outputs + case.batch)
    return actual


# Repeated pairs, in no order; input 1 and weight 3 are not used.  130 is two tiles of every size, the second nearly
# empty; 17 and 33 take unaligned loads, 48 and 96 aligned ones.
INDEX = integers(2, 0, 2, 2, 0), integers(1, 2, 0, 1, 2)
SHAPES = [
    IndexedCase(4, 130, 33, 130, sources=3, groups=5, activation="silu"),
    IndexedCase(4, 64, 96, 48, sources=3, groups=5),
    IndexedCase(4, 40, 160, 24, sources=3, groups=5, activation="tanh", x_layout="transposed"),
    IndexedCase(4, 17, 40, 40, sources=3, groups=5, activation="gelu", x_layout="inner", weight_layout="inner"),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_tile(case, dtype, tile, seed):
    actual = assert_right(case, *INDEX, dtype, seed, tile=tile)
    assert not actual["x"][1].any()
    assert not actual["weight"][3].any()
    assert not actual["bias"][3].any()


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tf32(case, seed):
    assert_right(case, *INDEX, torch.float32, seed, tf32=True)


# A warp reads 32 numbers at a time.
@pytest.mark.parametrize("groups", [0, 1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize(("sources", "members"), [(1, 9), (13, 1), (40, 70)])
def test_lists_of_any_length(groups, sources, members, seed):
    x_index = torch.randint(sources, (groups,), device=RUNNER.device)
    weight_index = torch.randint(members, (groups,), device=RUNNER.device)
    case = IndexedCase(members, 2, 3, 4, sources=sources, groups=groups)
    assert_right(case, x_index, weight_index, torch.float32, seed)


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_each_group_with_its_own_matrices_is_grouped_linear(tile, activation, seed):
    """To the bit."""
    case = IndexedCase(3, 33, 70, 20, sources=3, groups=3)
    (x, weight, bias), grad = tensors(case, torch.bfloat16, seed)
    actual = run((x, weight, bias), grad, integers(0, 1, 2), integers(0, 1, 2), activation, tile)
    code, save = ACTIVATIONS[activation].code, activation is not None
    y, z = _native.cuda_ops.grouped_linear_fwd(x, weight, bias, code, save, False, tile)
    grads = _native.cuda_ops.grouped_linear_bwd(grad, x, weight, z if save else y, code, *EVERY, False, tile)
    assert all(map(torch.equal, actual.values(), (y, *grads)))


def test_sums_over_groups_are_float32(seed):
    """A rounding to 16 bits after each group would lose what later groups add to the first."""
    groups = 600
    case = IndexedCase(1, 2, 5, 3, groups=groups)
    inputs, _ = tensors(case, torch.bfloat16, seed)
    grad = torch.ones(groups, 2, 3, dtype=torch.bfloat16, device=RUNNER.device)
    zeros = torch.zeros(groups, dtype=torch.int64, device=RUNNER.device)
    actual = run(inputs, grad, zeros, zeros)
    exact = oracle([t.double() for t in inputs], grad.double(), zeros, zeros)
    assert all(error(actual[name], exact[name]) <= 2.0**-8 for name in NAMES)


def test_integers_of_either_size_and_any_stride(seed):
    case = SHAPES[0]
    inputs, grad = tensors(case, torch.float32, seed)
    expected = run(inputs, grad, *INDEX, case.activation)
    for dtype in (torch.int32, torch.int64):
        plain = [i.to(dtype) for i in INDEX]
        apart = [torch.stack([i, i - 9, i + 99], 1)[:, 0] for i in plain]
        same = plain[0][:1].expand(5), plain[1]
        for index in (plain, apart, (plain[0], apart[1])):
            assert all(map(torch.equal, run(inputs, grad, *index, case.activation).values(), expected.values()))
        one = run(inputs, grad, *same, case.activation), run(inputs, grad, same[0].clone(), same[1], case.activation)
        assert all(map(torch.equal, one[0].values(), one[1].values()))


@pytest.mark.parametrize("activation", [None, "gelu", "tanh"])
@pytest.mark.parametrize("wrong", [-1, 3, 4, 2**31 - 1, -(2**31), 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_a_number_out_of_range_makes_zeros(wrong, activation, seed):
    """And the group adds nothing to any gradient, not even if what it would be multiplied by is not finite."""
    case = IndexedCase(3, 9, 20, 17, sources=3, groups=5)
    inputs, grad = tensors(case, torch.float32, seed)
    x_index, weight_index = integers(0, wrong, 2, 0, 1), integers(1, 2, 0, wrong, 1)
    if -(2**31) <= wrong < 2**31:
        x_index = x_index.int()
    grad[1], grad[3] = float("nan"), float("inf")
    actual = run(inputs, grad, x_index, weight_index, activation)
    right = [0, 2, 4]
    expected = run(inputs, grad[right].clone(), x_index[right], weight_index[right], activation)
    assert not actual["y"][[1, 3]].any()
    assert torch.equal(actual["y"][right], expected["y"])
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES[1:])


def test_nothing_to_name():
    """No number is in range."""
    for sources, members in [(0, 2), (2, 0), (0, 0)]:
        x, weight = (torch.ones(n, 4, 6, device=RUNNER.device) for n in (sources, members))
        bias, grad = torch.ones(members, 4, device=RUNNER.device), torch.ones(2, 4, 4, device=RUNNER.device)
        actual = run((x, weight, bias), grad, integers(0, 1), integers(1, 0))
        assert actual["y"].shape == (2, 4, 4)
        assert not any(value.any() for value in actual.values())


@pytest.mark.parametrize("activation", [None, "silu"])
def test_only_the_gradients_asked_for(activation, seed):
    case = IndexedCase(4, 20, 33, 18, sources=3, groups=5)
    inputs, grad = tensors(case, torch.float32, seed)
    every = run(inputs, grad, *INDEX, activation)
    for need in itertools.product((False, True), repeat=3):
        some = run(inputs, grad, *INDEX, activation, need=need)
        for name, wanted in zip(NAMES[1:], need):
            assert torch.equal(some[name], every[name]) if wanted else some[name].numel() == 0, (need, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_that_are_not_finite_stay_with_their_groups(dtype, seed):
    case = IndexedCase(4, 20, 33, 18, sources=3, groups=5)
    (x, weight, bias), grad = tensors(case, dtype, seed)
    x[1], weight[3], bias[3] = float("nan"), float("nan"), float("nan")  # of no group
    x[2, 3, 5], grad[1, 2, 4] = float("nan"), float("inf")
    actual = run((x, weight, bias), grad, *INDEX)
    expected = oracle([t.double() for t in (x, weight, bias)], grad.double(), *INDEX)
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert torch.equal(value.isfinite(), expected[name].isfinite()), name


def test_gradients_of_stride_zero(seed):
    case = SHAPES[1]
    inputs, _ = tensors(case, torch.float32, seed)
    grad = torch.ones((), device=RUNNER.device).expand(case.groups, case.batch, case.outputs)
    actual, expected = run(inputs, grad, *INDEX), run(inputs, grad.contiguous(), *INDEX)
    assert all(map(torch.equal, actual.values(), expected.values()))


def test_inputs_further_apart_than_32_bits_reach(seed):
    case = IndexedCase(2, 3, 24, 5, sources=2, groups=3)
    inputs, grad = tensors(case, torch.bfloat16, seed)
    index = integers(1, 0, 1), integers(0, 1, 1)
    storage = torch.empty(2**32 + 2**30, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    far = storage.as_strided(inputs[0].shape, (2**31 + 64, 2**30 + 8, 1)).copy_(inputs[0])
    near = run(inputs, grad, *index)
    assert all(map(torch.equal, run((far, *inputs[1:]), grad, *index).values(), near.values()))


def test_bad_calls_of_the_schema():
    x, weight, y = (torch.zeros(size, device=RUNNER.device) for size in ((2, 3, 4), (5, 6, 4), (2, 3, 6)))
    index = integers(0, 1)
    how = None, 0, False, False
    for arguments, words in [
        ((x, weight[0], index, index, *how), "x should be"),
        ((x[0], weight, index, index, *how), "x should be"),
        ((x[..., 1:], weight, index, index, *how), "x does not fit"),
        ((x, weight.half(), index, index, *how), "x does not fit"),
        ((x, weight, index, index[1:], *how), "weight_index should have 2 integers"),
        ((x, weight, index.float(), index, *how), "x_index should have 2 integers"),
        ((x, weight, index, index.short(), *how), "weight_index should have 2 integers"),
        ((x, weight, index, index, x[0, 0], 0, False, False), "bias does not fit"),
        ((x, weight, index, index, None, 9, False, False), "unknown activation code 9"),
        ((x, weight, index, index, *how, 3), "tile should be"),
        ((x.double(), weight.double(), index, index, *how), "take float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _native.cuda_ops.indexed_linear_fwd(*arguments)
    for arguments, words in [
        ((y[1:], x, weight, index, index, y, 1), "grad does not fit"),
        ((y, x, weight, index, index, y[..., 1:], 1), "saved does not fit"),
        ((y, x, weight, index, index[1:], y, 1), "weight_index should have 2 integers"),
        ((y, x, weight, index, index, y, -1), "unknown activation code -1"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _native.cuda_ops.indexed_linear_bwd(*arguments, *EVERY, False)


@pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")
def test_results_do_not_depend_on_the_order_of_threads(seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256()\n"
        "sizes = (3, 40, 36), (4, 34, 36), (4, 34), (40, 40, 34)\n"
        "index = torch.randint(3, (40,)), torch.randint(4, (40,))\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x, w, b, g = (torch.randn(size).to(dtype) for size in sizes)\n"
        "    y, z = _native.cuda_ops.indexed_linear_fwd(x, w, *index, b, 2, True, False, 1)\n"
        "    need = True, True, True, False, 1\n"
        "    for t in (y, z, *_native.cuda_ops.indexed_linear_bwd(g, x, w, *index, z, 2, *need)):\n"
        "        digest.update(t.float().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    orders = "forward", "reverse", "1"
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=order) for order in orders]
    assert all(r.returncode == 0 for r in runs), runs
    assert len({r.stdout for r in runs}) == 1
