"""The CUDA C++ kernels of mix_templates: every tile, type and cut, as tests/test_cuda_kernels.py does."""

from __future__ import annotations

import os

import pytest
import torch
from common import Runner, name_of, run_python, sample
from torch import Tensor

from effens_kernels import _native
from effens_kernels.testing import MixCase, assert_accurate

RUNNER = Runner("cuda")
if RUNNER.why_not() is not None:
    pytest.skip(RUNNER.why_not(), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {0: "small", 1: "large"}
BOTH = True, True


def run(coefficients: Tensor, templates: Tensor, grad: Tensor, tile=-1, blocks=0, need=BOTH) -> dict[str, Tensor]:
    """Forward and backward through the schemas."""
    y = _native.cuda_ops.mix_templates_fwd(coefficients, templates, tile)
    grads = _native.cuda_ops.mix_templates_bwd(grad, coefficients, templates, *need, tile, blocks)
    return {"y": y, **dict(zip(("coefficients", "templates"), grads, strict=True))}


def assert_right(case: MixCase, dtype: torch.dtype, seed: int, **how) -> dict[str, Tensor]:
    inputs, grad, exact, composition = sample("mix_templates", case, dtype, RUNNER.device, seed)
    actual = run(*inputs, grad, **how)
    for name in exact:
        assert actual[name].is_contiguous()
        assert_accurate(actual[name], exact[name], composition[name], name, case.terms()[name])
    return actual


# More rows, templates or columns than a thread, a round of threads, a slice, a step or a block takes; 16-byte loads and
# others.  A step has 1024 columns of four rows in float32 and 2048 in 16 bits, and fewer of more rows.
SHAPES = [
    MixCase((1,), 1, (1,)),
    MixCase((3,), 5, (17,)),
    MixCase((4,), 4, (4200,)),
    MixCase((2,), 3, (4099,)),
    MixCase((13,), 11, (1037,)),
    MixCase((33,), 17, (600,)),
    MixCase((70,), 9, (300,)),
    MixCase((9,), 70, (300,)),
    MixCase((64,), 64, (136,)),
    MixCase((5,), 140, (72,)),
    MixCase((300,), 3, (130,)),
    MixCase((130,), 67, (40,)),
    MixCase((7,), 6, (520,), layout="offset", coefficient_layout="offset"),
    MixCase((7,), 6, (520,), layout="inner", coefficient_layout="inner"),
    MixCase((7,), 6, (520,), layout="stepped", coefficient_layout="stepped"),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_tile(case, dtype, tile, session_seed):
    assert_right(case, dtype, session_seed, tile=tile)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 65536])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_cut_of_columns(blocks, dtype, tile, session_seed):
    """Blocks with several steps and with one, of which the last is shorter."""
    assert_right(MixCase((6,), 7, (4600,)), dtype, session_seed, tile=tile, blocks=blocks)
    if blocks > 5 or tile == 1:
        assert_right(MixCase((40,), 60, (1100,)), dtype, session_seed, tile=tile, blocks=blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_more_parts_than_a_warp_has_lanes(dtype, session_seed):
    """A step of so many rows has 32 or 64 columns."""
    assert_right(MixCase((250,), 2, (2150,)), dtype, session_seed, blocks=65536)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 12, 17, 36])
@pytest.mark.parametrize("templates", [1, 4, 7, 16, 25, 33])
def test_what_is_chosen(rows, templates, session_seed):
    for columns in (3, 130):
        assert_right(MixCase((rows,), templates, (columns,)), torch.float32, session_seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_the_same_bits_again(dtype, tile, session_seed):
    inputs, grad, *_ = sample("mix_templates", MixCase((9,), 6, (2500,)), dtype, RUNNER.device, session_seed)
    first, second = (run(*inputs, grad, tile) for _ in range(2))
    assert all(map(torch.equal, first.values(), second.values()))


@pytest.mark.parametrize("sizes", [(3, 5, 33), (3, 5, 2100), (70, 40, 64), (300, 3, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_only_the_gradients_asked_for(sizes, dtype, session_seed):
    rows, templates, columns = sizes
    inputs, grad, *_ = sample(
        "mix_templates", MixCase((rows,), templates, (columns,)), dtype, RUNNER.device, session_seed
    )
    every = run(*inputs, grad)
    for need in ((True, False), (False, True), (False, False)):
        some = run(*inputs, grad, need=need)
        for name, wanted in zip(("coefficients", "templates"), need):
            assert torch.equal(some[name], every[name]) if wanted else some[name].shape == (0,), (need, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("columns", [37, 40])
def test_strides(dtype, columns, seed):
    """Gradients of sums, of transposed results and of one row for all; steps and repetitions of every operand."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=RUNNER.device).to(dtype)

    rows, count = 5, 6
    inputs = normal(rows, count), normal(count, columns)
    gradients = (
        normal().expand(rows, columns),
        normal(columns).expand(rows, columns),
        normal(rows, 1).expand(rows, columns),
        normal(columns, rows).T,
        normal(rows, columns + 8)[:, 8:],
        normal(rows, columns + 8)[:, 3 : columns + 3],
        normal(rows, 2 * columns)[:, ::2],
        normal(2 * rows, columns)[::2],
    )
    for grad in gradients:
        actual, expected = run(*inputs, grad), run(*inputs, grad.clone(memory_format=torch.contiguous_format))
        assert all(map(torch.equal, actual.values(), expected.values()))
    views = (
        (normal(count, rows).T, normal(count).expand(count, count)[:, :1].expand(count, columns)),
        (normal(count).expand(rows, count), normal(columns).expand(count, columns)),
        (normal(1, 1).expand(rows, count), normal(columns, count).T),
        (normal(rows, 2 * count)[:, ::2], normal(count, columns + 1)[:, 1:]),
        (normal(2 * rows, count)[1::2], normal(2 * count, columns)[::2]),
    )
    for coefficients, templates in views:
        actual = run(coefficients, templates, gradients[0])
        whole = (t.clone(memory_format=torch.contiguous_format) for t in (coefficients, templates, gradients[0]))
        assert all(map(torch.equal, actual.values(), run(*whole).values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_to_sum_makes_zeros(dtype):
    for rows, columns in [(0, 7), (3, 0), (0, 0)]:
        coefficients, templates, grad = (
            torch.ones(size, dtype=dtype, device=RUNNER.device) for size in ((rows, 4), (4, columns), (rows, columns))
        )
        actual = run(coefficients, templates, grad)
        assert actual["y"].shape == (rows, columns)
        assert torch.equal(actual["coefficients"], torch.zeros_like(coefficients))
        assert torch.equal(actual["templates"], torch.zeros_like(templates))


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_not_finite_values_flow_through(dtype, tile, seed):
    """To where PyTorch has them, and nowhere else: not from beyond the edge of tiles either."""
    for rows, count, columns in [(5, 3, 37), (9, 17, 40)]:
        coefficients, templates, grad = (
            torch.randn(size, device=RUNNER.device).to(dtype)
            for size in ((rows, count), (count, columns), (rows, columns))
        )
        coefficients[-1, 1], templates[-1, 2], grad[-2, -1] = float("nan"), float("inf"), float("-inf")
        actual = run(coefficients, templates, grad, tile)
        wide = [t.double() for t in (coefficients, templates, grad)]
        expected = {"y": wide[0] @ wide[1], "coefficients": wide[2] @ wide[1].T, "templates": wide[0].T @ wide[2]}
        for name, value in actual.items():
            assert torch.equal(value.isnan(), expected[name].isnan()), name
            assert torch.equal(value.isposinf(), expected[name].isposinf()), name
            assert torch.equal(value.isneginf(), expected[name].isneginf()), name


def test_rows_further_apart_than_32_bits_reach(seed):
    coefficients, templates, grad = (
        torch.randn(size, device=RUNNER.device).bfloat16() for size in ((3, 2), (2, 24), (3, 24))
    )
    storage = torch.empty(2**32 + 2**30, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    near = run(coefficients, templates, grad)
    far = storage.as_strided(templates.shape, (2**32 + 8, 1)).copy_(templates)
    assert all(map(torch.equal, run(coefficients, far, grad).values(), near.values()))
    far = storage.as_strided(grad.shape, (2**31 + 64, 1)).copy_(grad)
    assert all(map(torch.equal, run(coefficients, templates, far).values(), near.values()))
    far = storage.as_strided(coefficients.shape, (1, 2**32)).copy_(coefficients)
    assert all(map(torch.equal, run(far, templates, grad).values(), near.values()))


def test_bad_calls_of_the_schema():
    coefficients, templates, grad = (torch.zeros(size, device=RUNNER.device) for size in ((3, 4), (4, 5), (3, 5)))
    fwd, bwd = _native.cuda_ops.mix_templates_fwd, _native.cuda_ops.mix_templates_bwd
    for arguments, words in [
        ((coefficients[0], templates), "coefficients should be"),
        ((coefficients, templates[0]), "templates should be"),
        ((coefficients[:, :0], templates[:0]), "at least one template"),
        ((coefficients, templates[1:]), "templates does not fit"),
        ((coefficients, templates.half()), "templates does not fit"),
        ((coefficients, templates, 2), "tile should be"),
        ((coefficients.double(), templates.double()), "take float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            fwd(*arguments)
    for arguments, words in [
        ((grad[1:], coefficients, templates, *BOTH), "grad does not fit"),
        ((grad[:, 1:], coefficients, templates, *BOTH), "grad does not fit"),
        ((grad.half(), coefficients, templates, *BOTH), "grad does not fit"),
        ((grad, coefficients, templates, *BOTH, -1, -1), "blocks should be"),
        ((grad, coefficients, templates, *BOTH, 2), "tile should be"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            bwd(*arguments)


@pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")
def test_results_do_not_depend_on_the_order_of_threads(seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256()\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for rows, count, columns in ((5, 7, 3000), (20, 33, 301)):\n"
        "        c, t, g = (torch.randn(s).to(dtype) for s in ((rows, count), (count, columns), (rows, columns)))\n"
        "        for tile in range(2):\n"
        "            y = _native.cuda_ops.mix_templates_fwd(c, t, tile)\n"
        "            for r in (y, *_native.cuda_ops.mix_templates_bwd(g, c, t, True, True, tile, 3)):\n"
        "                digest.update(r.float().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    orders = "forward", "reverse", "1"
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=order) for order in orders]
    assert all(r.returncode == 0 for r in runs), runs
    assert len({r.stdout for r in runs}) == 1
