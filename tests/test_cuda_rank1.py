"""The CUDA C++ kernels of rank1_linear: every tile, type and cut of the sums, as tests/test_cuda_kernels.py does."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from common import Runner, name_of, run_python, sample
from torch import Tensor

from effens_kernels import _native
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import Rank1Case, assert_accurate, error

RUNNER = Runner("cuda")
if RUNNER.why_not() is not None:
    pytest.skip(RUNNER.why_not(), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {0: "small", 1: "medium", 2: "large"}
TF32_EPS = 2.0**-10
GRADIENTS = ("x", "weight", "r", "s", "bias")
EVERY = (True,) * 5


def run(inputs, grad: Tensor, activation: str | None = None, tile=-1, tf32=False, parts=0, need=EVERY) -> dict:
    """Forward and backward through the schemas."""
    x, weight, r, s, bias = inputs
    shared_bias = bias is not None and bias.dim() == 1
    if shared_bias:
        bias = bias.expand(r.shape[0], -1)
    code, save = ACTIVATIONS[activation].code, ACTIVATIONS[activation].saves == "preactivation"
    y, z = _native.cuda_ops.rank1_linear_fwd(x, weight, r, s, bias, code, save, tf32, tile)
    saved = z if save else y
    grads = _native.cuda_ops.rank1_linear_bwd(grad, x, weight, r, s, saved, code, *need, tf32, tile, parts)
    named = {"y": y, **dict(zip(GRADIENTS, grads))}
    if shared_bias and need[-1]:
        named["bias"] = named["bias"].sum(0)
    return named


def assert_right(case: Rank1Case, dtype: torch.dtype, seed: int, tf32: bool = False, **how) -> dict:
    inputs, grad, exact, composition = sample("rank1_linear", case, dtype, RUNNER.device, seed)
    actual = run(inputs, grad, case.activation, tf32=tf32, **how)
    for name in exact:
        if tf32:
            assert error(actual[name], exact[name]) <= 6 * TF32_EPS, name
        else:
            assert_accurate(actual[name], exact[name], composition[name], name, case.terms()[name])
    return actual


# 130 is two tiles of every size, the second nearly empty; 17 and 33 take unaligned loads, 48 and 96 aligned ones.
SHAPES = [
    Rank1Case(2, 130, 33, 130, activation="relu"),
    Rank1Case(2, 96, 48, 160, activation="gelu", shared_bias=True),
    Rank1Case(3, 17, 130, 40, shared=True, activation="silu"),
    Rank1Case(2, 64, 96, 64, shared=True, bias=False),
    Rank1Case(2, 40, 264, 24, activation="tanh", x_layout="transposed", scale_layout="offset"),
    Rank1Case(2, 40, 40, 40, x_layout="inner", weight_layout="inner", scale_layout="inner", activation="relu"),
    Rank1Case(2, 24, 40, 48, x_layout="offset", weight_layout="offset", scale_layout="stepped"),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_tile(case, dtype, tile, session_seed):
    assert_right(case, dtype, session_seed, tile=tile)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_tf32(case, tile, session_seed):
    if case.activation == "relu":  # whose slope jumps where rounding to TF32 decides
        case = replace(case, activation="tanh")
    actual = assert_right(case, torch.float32, session_seed, tf32=True, tile=tile)
    assert (
        error(actual["y"], sample("rank1_linear", case, torch.float32, RUNNER.device, session_seed).exact["y"]) > 1e-5
    )


# Groups of members that do not come out even, each member by itself, and its rows in parts, the last one shorter.
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 10, 15, 65536])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", [0, 2], ids=TILES.get)
def test_every_cut_of_members_and_rows(parts, dtype, tile, session_seed):
    case = Rank1Case(5, 150, 40, 35, shared=parts % 2 == 0, activation="relu")
    assert_right(case, dtype, session_seed, tile=tile, parts=parts)


@pytest.mark.parametrize("members", [1, 3, 9])
def test_the_cut_that_is_chosen(members, session_seed):
    assert_right(Rank1Case(members, 1200, 20, 30), torch.float32, session_seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_the_same_bits_again(dtype, tile, session_seed):
    case = Rank1Case(3, 70, 50, 66, shared=True, activation="gelu")
    inputs, grad, *_ = sample("rank1_linear", case, dtype, RUNNER.device, session_seed)
    first, second = (run(inputs, grad, case.activation, tile, parts=4) for _ in range(2))
    assert all(map(torch.equal, first.values(), second.values()))


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("parts", [1, 3])
def test_only_the_gradients_asked_for(activation, shared, parts, session_seed):
    case = Rank1Case(3, 20, 33, 18, shared=shared, activation=activation)
    inputs, grad, *_ = sample("rank1_linear", case, torch.float32, RUNNER.device, session_seed)
    every = run(inputs, grad, activation, parts=parts)
    for need in itertools.product((False, True), repeat=5):
        some = run(inputs, grad, activation, parts=parts, need=need)
        for name, wanted in zip(GRADIENTS, need):
            assert torch.equal(some[name], every[name]) if wanted else some[name].numel() == 0, (need, name)


def test_scales_and_gradients_of_stride_zero(seed):
    x, weight, s = (torch.randn(size, device=RUNNER.device) for size in ((6, 20), (9, 20), (4, 9)))
    r, row = torch.randn(20, device=RUNNER.device).expand(4, 20), torch.randn(9, 1, device=RUNNER.device)
    bias, grad = row.expand(9, 4).T, torch.ones((), device=RUNNER.device).expand(4, 6, 9)
    views = (x, weight, r, s, bias)
    actual, expected = run(views, grad), run([t.contiguous() for t in views], grad.contiguous())
    assert all(map(torch.equal, actual.values(), expected.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_to_sum_makes_zeros(dtype):
    for members, batch, inputs, outputs in [(2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0), (0, 4, 3, 5), (0, 0, 0, 0)]:
        for shared in (False, True):
            case = Rank1Case(members, batch, inputs, outputs, shared=shared)
            tensors = case.inputs_for(dtype, RUNNER.device, 0)
            grad = torch.ones(members, batch, outputs, dtype=dtype, device=RUNNER.device)
            actual = run(tensors, grad)
            for name, value in actual.items():
                expected = torch.zeros_like(grad if name == "y" else tensors[GRADIENTS.index(name)])
                if name == "y":
                    expected += tensors[4][:, None]
                elif name == "bias":
                    expected += batch
                assert torch.equal(value, expected), (case, name)


def test_not_finite_values_flow_through(seed):
    """An infinite gradient may make ds NaN where PyTorch has Inf, since the sum over i of its products comes last."""
    for dtype in DTYPES:
        case = Rank1Case(2, 20, 33, 18)
        inputs, grad, *_ = sample("rank1_linear", case, dtype, RUNNER.device, seed)
        x, grad = inputs[0].clone(), grad.clone()
        x[0, 3, 5], grad[1, 2, 4] = float("nan"), float("inf")
        inputs = (x, *inputs[1:])
        actual, expected = run(inputs, grad), exact(inputs, grad)
        for name, value in actual.items():
            assert torch.equal(value.isfinite(), expected[name].isfinite()), (dtype, name)
            if name != "s":
                assert torch.equal(value.isnan(), expected[name].isnan()), (dtype, name)


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_what_lies_beyond_the_edge_does_not_make_nan(tile, seed):
    """There operands are zero, and zero times infinity is not."""
    inputs, grad, *_ = sample("rank1_linear", Rank1Case(1, 9, 20, 1), torch.float32, RUNNER.device, seed)
    x = inputs[0].clone()
    x[0, 3, 5] = float("inf")
    assert run((x, *inputs[1:]), grad, tile=tile)["r"][0, 5].isinf()
    inputs, grad, *_ = sample("rank1_linear", Rank1Case(1, 9, 1, 20), torch.float32, RUNNER.device, seed)
    grad = grad.clone()
    grad[0, 3, 5] = float("inf")
    assert run(inputs, grad, tile=tile)["s"][0, 5].isinf()
    for count in (37, 40):  # the factors of the step before are not used again
        inputs, grad, *_ = sample("rank1_linear", Rank1Case(2, 9, count, count), torch.float32, RUNNER.device, seed)
        x, weight, r, s, bias = (t.clone() for t in inputs)
        r[0, 13], s[1, 13] = float("inf"), float("inf")
        actual = run((x, weight, r, s, bias), grad, tile=tile)
        assert actual["y"][0].isinf().all()
        assert actual["x"][1].isinf().all()


def exact(inputs, grad: Tensor) -> dict:
    x, weight, r, s, bias = (t.double().requires_grad_() for t in inputs)
    y = ((x * r[:, None]) @ weight.T) * s[:, None] + bias[:, None]
    grads = torch.autograd.grad(y, (x, weight, r, s, bias), grad.double())
    return {"y": y, **dict(zip(GRADIENTS, grads))}


def test_members_and_rows_further_apart_than_32_bits_reach(seed):
    case = Rank1Case(2, 3, 24, 5)
    inputs, grad, *_ = sample("rank1_linear", case, torch.bfloat16, RUNNER.device, seed)
    storage = torch.empty(2**32 + 2**30, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    far = storage.as_strided(inputs[0].shape, (2**31 + 64, 2**30 + 8, 1)).copy_(inputs[0])
    near = run(inputs, grad)
    assert all(map(torch.equal, run((far, *inputs[1:]), grad).values(), near.values()))


def test_bad_calls_of_the_schema():
    x, weight, r, s = (torch.zeros(size, device=RUNNER.device) for size in ((2, 3, 4), (5, 4), (2, 4), (2, 5)))
    fwd, bwd = _native.cuda_ops.rank1_linear_fwd, _native.cuda_ops.rank1_linear_bwd
    y = torch.zeros(2, 3, 5, device=RUNNER.device)
    how = None, 0, False, False
    for arguments, words in [
        ((x, weight[0], r, s, *how), "weight should be"),
        ((x[0, 0], weight, r, s, *how), "x should be"),
        ((x, weight, r[0], s, *how), "r should be"),
        ((x, weight, r, s[0], *how), "s does not fit"),
        ((x, weight, r, s[:, 1:], *how), "s does not fit"),
        ((x, weight, r[:, 1:], s, *how), "r does not fit"),
        ((x, weight, r[:1], s[:1], *how), "x does not fit"),
        ((x[..., 1:], weight, r, s, *how), "x does not fit"),
        ((x, weight.half(), r, s, *how), "weight does not fit"),
        ((x, weight, r, s, x[0, 0], 0, False, False), "bias does not fit"),
        ((x, weight, r, s, None, 9, False, False), "unknown activation code 9"),
        ((x, weight, r, s, *how, 3), "tile should be"),
        ((x.double(), weight.double(), r.double(), s.double(), *how), "take float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            fwd(*arguments)
    for arguments, words in [
        ((y[1:], x, weight, r, s, y, 1, *EVERY, False), "grad does not fit"),
        ((y, x, weight, r, s, y[..., 1:], 1, *EVERY, False), "saved does not fit"),
        ((y, x, weight, r, s, y, -1, *EVERY, False), "unknown activation code -1"),
        ((y, x, weight, r, s, y, 1, *EVERY, False, 0, -1), "parts should be"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            bwd(*arguments)


@pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")
def test_results_do_not_depend_on_the_order_of_threads(seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256()\n"
        "sizes = (2, 70, 36), (34, 36), (2, 36), (2, 34), (2, 34), (2, 70, 34)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x, w, r, s, b, g = (torch.randn(size).to(dtype) for size in sizes)\n"
        "    for tile in range(2):\n"
        "        y, z = _native.cuda_ops.rank1_linear_fwd(x, w, r, s, b, 2, True, False, tile)\n"
        "        need = True, True, True, True, True, False, tile, 1 + 3 * tile\n"
        "        for t in (y, z, *_native.cuda_ops.rank1_linear_bwd(g, x, w, r, s, z, 2, *need)):\n"
        "            digest.update(t.float().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    orders = "forward", "reverse", "1"
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=order) for order in orders]
    assert all(r.returncode == 0 for r in runs), runs
    assert len({r.stdout for r in runs}) == 1
