"""The CUDA C++ kernels: what the public ops do not reach, or not on every machine.

Without a GPU they run in the emulation, which turns accesses out of bounds, races, reads of what nobody wrote and
unwritten results into errors, so that each call here is a check of all that as well.
"""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import pytest
import torch
from common import Runner, name_of, run_python
from torch import Tensor

import effens_kernels as ek
from effens_kernels import _native
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.testing import LinearCase, error

RUNNER = Runner("cuda")
if RUNNER.why_not() is not None:
    pytest.skip(RUNNER.why_not(), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {0: "small", 1: "medium", 2: "large"}
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
TF32_EPS = 2.0**-10


class Results(NamedTuple):
    y: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor


def run(
    case: LinearCase, inputs, grad: Tensor, tile: int = -1, tf32: bool = False, saved: Tensor | None = None
) -> Results:
    """Forward and backward through the schemas; `saved` replaces what forward saves."""
    x, weight, bias = inputs
    activation = ACTIVATIONS[case.activation]
    save = activation.saves == "preactivation"
    y, z = _native.cuda_ops.grouped_linear_fwd(x, weight, bias, activation.code, save, tf32, tile)
    saved = (z if save else y) if saved is None else saved
    grads = _native.cuda_ops.grouped_linear_bwd(grad, x, weight, saved, activation.code, True, True, True, tf32, tile)
    return Results(y, *grads)


def exact(case: LinearCase, inputs, grad: Tensor) -> tuple[Results, Tensor]:
    """The same in float64, and what forward saves there."""
    x, weight, bias = (t.double().requires_grad_() for t in inputs)
    z = reference.grouped_linear(x, weight, bias, None)
    y = ACTIVATIONS[case.activation].apply(z)
    grads = torch.autograd.grad(y, (x, weight, bias), grad.double())
    return Results(y.detach(), *grads), (z if ACTIVATIONS[case.activation].saves == "preactivation" else y).detach()


def sample(case: LinearCase, dtype: torch.dtype, seed: int):
    inputs = case.inputs_for(dtype, RUNNER.device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn((case.members, case.batch, case.outputs), generator=generator, dtype=torch.float64)
    return inputs, grad.to(RUNNER.device, dtype)


def assert_equal(actual: Results, expected: Results, eps: float) -> None:
    """Errors of a few units: products of rounded values, whose sums are in float32."""
    for name, value, wanted in zip(Results._fields, actual, expected):
        assert error(value, wanted) <= 4 * eps + 2e-6, name


# 130 is two tiles of every size, the second nearly empty; 17 and 33 take unaligned loads, 48 and 96 aligned ones.
SHAPES = [
    LinearCase(2, 130, 33, 130, activation="relu"),
    LinearCase(2, 96, 48, 160, activation="gelu"),
    LinearCase(3, 17, 130, 40, shared=True, activation="silu"),
    LinearCase(2, 64, 96, 64, shared=True),
    LinearCase(2, 40, 264, 24, activation="tanh", x_layout="transposed"),
    LinearCase(2, 40, 40, 40, x_layout="inner", weight_layout="inner", activation="relu"),
    LinearCase(2, 24, 40, 48, x_layout="offset", weight_layout="offset"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_tile(case, tile, dtype, seed):
    inputs, grad = sample(case, dtype, seed)
    expected, saved = exact(case, inputs, grad)
    assert_equal(run(case, inputs, grad, tile, saved=saved.to(dtype)), expected, EPS[dtype])


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tf32(case, tile, seed):
    inputs, grad = sample(case, torch.float32, seed)
    expected, saved = exact(case, inputs, grad)
    actual = run(case, inputs, grad, tile, tf32=True, saved=saved.float())
    assert_equal(actual, expected, TF32_EPS)
    assert error(actual.y, expected.y) > 1e-5, "not rounded to TF32"


def test_tf32_follows_torchs_setting(seed):
    case = LinearCase(2, 20, 40, 24)
    (x, weight, bias), _ = sample(case, torch.float32, seed)
    expected = reference.grouped_linear(x.double(), weight.double(), bias.double(), None)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, rounded in (("ieee", False), ("tf32", True)):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert (error(ek.grouped_linear(x, weight, bias, backend="cuda"), expected) > 1e-5) == rounded
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_the_same_bits_again(tile, dtype, seed):
    case = LinearCase(3, 70, 50, 66, shared=True, activation="gelu")
    inputs, grad = sample(case, dtype, seed)
    first, second = (run(case, inputs, grad, tile) for _ in range(2))
    assert all(map(torch.equal, first, second))


NEEDS = [need for need in itertools.product((False, True), repeat=3) if any(need)]


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: "".join(n for n, wanted in zip("xwb", need) if wanted))
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_only_the_gradients_asked_for(need, shared, seed):
    case = LinearCase(3, 20, 33, 18, shared=shared, activation="tanh")
    (x, weight, bias), grad = sample(case, torch.float32, seed)
    y = _native.cuda_ops.grouped_linear_fwd(x, weight, bias, 4, False, False)[0]
    every = _native.cuda_ops.grouped_linear_bwd(grad, x, weight, y, 4, True, True, True, False)
    some = _native.cuda_ops.grouped_linear_bwd(grad, x, weight, y, 4, *need, False)
    for wanted, one, other in zip(need, some, every):
        assert torch.equal(one, other) if wanted else one.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_not_finite_values_flow_through(dtype, seed):
    case = LinearCase(2, 20, 33, 18, activation="relu")
    (x, weight, bias), grad = sample(case, dtype, seed)
    x[0, 3, 5], weight[1, 2, 0], grad[0, 1, 1] = float("nan"), float("inf"), float("inf")
    actual = run(case, (x, weight, bias), grad)
    expected, _ = exact(case, (x, weight, bias), grad)
    for name, value, wanted in zip(Results._fields, actual, expected):
        assert torch.equal(value.isnan(), wanted.isnan()), name


def test_members_and_rows_further_apart_than_32_bits_reach(seed):
    case = LinearCase(2, 3, 24, 5)
    inputs, grad = sample(case, torch.bfloat16, seed)
    storage = torch.empty(2**32 + 2**30, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    far = storage.as_strided(inputs[0].shape, (2**31 + 64, 2**30 + 8, 1)).copy_(inputs[0])
    near, expected = run(case, inputs, grad), exact(case, inputs, grad)[0]
    assert_equal(near, expected, EPS[torch.bfloat16])
    assert all(map(torch.equal, run(case, (far, *inputs[1:]), grad), near))


def test_bad_calls_of_the_schema():
    x, weight = torch.zeros(2, 3, 4, device=RUNNER.device), torch.zeros(2, 5, 4, device=RUNNER.device)
    fwd = _native.cuda_ops.grouped_linear_fwd
    for arguments, words in [
        ((x, weight[0], None, 0, False, False), "weight should be"),
        ((x[..., 1:], weight, None, 0, False, False), "does not fit"),
        ((x, weight.half(), None, 0, False, False), "does not fit"),
        ((x, weight, x[0, 0], 0, False, False), "bias does not fit"),
        ((x, weight, None, 9, False, False), "unknown activation code 9"),
        ((x, weight, None, 0, False, False, 3), "tile should be"),
        ((x.double(), weight.double(), None, 0, False, False), "take float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            fwd(*arguments)


# ------------------------------------------------------------------------------------------------ the emulation alone

emulated = pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")


@emulated
@pytest.mark.parametrize("order", ["reverse", "1", "2"])
def test_results_do_not_depend_on_the_order_of_threads(order, seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256()\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x, w, b, g = (torch.randn(s).to(dtype) for s in ((2, 70, 50), (2, 66, 50), (2, 66), (2, 70, 66)))\n"
        "    for tile in range(3):\n"
        "        y, z = _native.cuda_ops.grouped_linear_fwd(x, w, b, 2, True, False, tile)\n"
        "        for t in (y, z, *_native.cuda_ops.grouped_linear_bwd(g, x, w, z, 2, True, True, True, False, tile)):\n"
        "            digest.update(t.float().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=o) for o in ("forward", order)]
    assert all(r.returncode == 0 for r in runs), runs
    assert runs[0].stdout == runs[1].stdout


@emulated
def test_a_library_that_does_not_load_is_an_error():
    run = run_python("import effens_kernels", EFFENS_CUDA_EMULATION="/nowhere.so")
    assert run.returncode != 0
    assert "EFFENS_CUDA_EMULATION: /nowhere.so does not load" in run.stderr
