"""ensemble_predict's Triton kernels, and those of its regression twin, in the interpreter: what
tests/test_ensemble_predict.py, which they run as well, does not reach.

A program takes a tenth of a second.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run Triton kernels on CPU tensors", allow_module_level=True)
pytest.importorskip("triton")

from common import name_of
from predict_cases import DTYPES, check, check_each_gradient_alone, check_regression, logits_of

from effens_kernels.ops.ensemble_predict import triton as ensemble_predict
from effens_kernels.ops.ensemble_predict_regression import triton as regression


@pytest.fixture
def short_tiles(monkeypatch):
    """Rows are long from few classes on."""
    ensemble_predict._plan_fwd.cache_clear(), ensemble_predict._plan_bwd.cache_clear()
    monkeypatch.setattr(ensemble_predict, "MOST_CLASSES", 64)
    yield
    ensemble_predict._plan_fwd.cache_clear(), ensemble_predict._plan_bwd.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 300, 2),  # more rows than a program has
        (5, 3, 17),
        (2, 2, 256),  # a whole tile
    ],
    ids=str,
)
def test_values(sizes, dtype):
    check(ensemble_predict, logits_of(sizes, "contiguous", dtype, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_long_rows(dtype, short_tiles):
    for classes in (65, 128):
        check(ensemble_predict, logits_of((2, 2, classes), "contiguous", dtype, "cpu"))


def test_rows_longer_than_any_tile():
    check(ensemble_predict, logits_of((2, 1, 2500), "contiguous", torch.float32, "cpu"))


@pytest.mark.parametrize("layout", ["transposed", "inner", "stepped", "offset"])
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_strides(layout, long, request):
    if long:
        request.getfixturevalue("short_tiles")
    z = logits_of((3, 2, 70), layout, torch.bfloat16, "cpu")
    found = check(ensemble_predict, z)
    negative = ensemble_predict.fwd(torch._neg_view(-z))
    assert all(map(torch.equal, negative, found))


def test_each_gradient_alone():
    check_each_gradient_alone(ensemble_predict, logits_of((3, 2, 9), "contiguous", torch.float32, "cpu"))


def test_each_gradient_of_long_rows_alone(short_tiles):
    check_each_gradient_alone(ensemble_predict, logits_of((2, 2, 70), "contiguous", torch.float32, "cpu"))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, which the interpreter computes with
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_long_rows_are_nan_and_no_others(bad, short_tiles):
    z = logits_of((2, 3, 100), "contiguous", torch.float32, "cpu")
    z[1, 2, 80] = bad
    results = ensemble_predict.fwd(z)
    dlogits = ensemble_predict.bwd(z, results[0], *map(torch.ones_like, results[:5]))
    for result in (*results, dlogits.transpose(0, 1)):
        bad_rows = result.isnan().reshape(3, -1)
        assert bad_rows[2].all()
        assert not bad_rows[:2].any()


def test_classes_that_cannot_be(short_tiles):
    """-inf adds nothing and has no gradient, a whole chunk of them neither."""
    for classes in (7, 200):
        z = logits_of((3, 3, classes), "contiguous", torch.float32, "cpu")
        z[torch.rand(z.shape) < 0.3] = float("-inf")
        z[:, :, 1], z[:, 1, :65], z[:, :, -1] = float("-inf"), float("-inf"), 0
        found = check(ensemble_predict, z)
        assert (found[6][z.isneginf()] == 0).all()


def test_the_same_bits_again(short_tiles):
    z = logits_of((3, 2, 150), "contiguous", torch.float32, "cpu")
    assert all(map(torch.equal, ensemble_predict.fwd(z), ensemble_predict.fwd(z)))


def test_offsets_beyond_32_bits(short_tiles):
    """The pages between rows are never touched."""
    for classes in (3, 70):
        near = logits_of((2, 2, classes), "contiguous", torch.float16, "cpu")
        storage = torch.empty(2**32 + 2**31 + 128, dtype=torch.float16)
        far = storage.as_strided(near.shape, (2**32, 2**31 - 8, 1)).copy_(near)
        results = ensemble_predict.fwd(near)
        assert all(map(torch.equal, ensemble_predict.fwd(far), results))
        grads = results[:5]
        assert torch.equal(*(ensemble_predict.bwd(z, results[0], *grads) for z in (near, far)))


def test_empty_batches():
    z = torch.empty(3, 0, 5)
    results = ensemble_predict.fwd(z)
    assert [tuple(t.shape) for t in results] == [(0, 5)] * 2 + [(0,)] * 4
    assert ensemble_predict.bwd(z, results[0], *results[:5]).shape == z.shape
    results = regression.fwd(z[..., 0], z[..., 1])
    assert [tuple(t.shape) for t in results] == [(0,)] * 4
    assert all(t.shape == (3, 0) for t in regression.bwd(z[..., 0], results[0], *results, True, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_regression(dtype):
    means = torch.randn(4, 130).to(dtype)
    check_regression(regression, means, None)
    for view in (means, means[:, :3].T, means[:1, 1::2].expand(3, -1)):
        check_regression(regression, view, view.abs())
