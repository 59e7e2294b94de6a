"""The CUDA C++ kernels of ensemble_predict and its regression twin: teams of every size, long rows, types and strides.

Values that any backend should have are in tests/test_ensemble_predict.py, which these run as well.
"""

from __future__ import annotations

import os

import pytest
import torch
from common import Runner, name_of, run_python
from predict_cases import DTYPES, check, check_each_gradient_alone, check_regression, logits_of

from effens_kernels.ops.ensemble_predict import cuda as ensemble_predict
from effens_kernels.ops.ensemble_predict_regression import cuda as regression

RUNNER = Runner("cuda")
if RUNNER.why_not() is not None:
    pytest.skip(RUNNER.why_not(), allow_module_level=True)

# Teams of one thread, of some lanes, of a warp and of a block; rows that fill them and that do not, in 16-byte vectors
# and others; long rows of one block and a bit, and of many.
CLASSES = [1, 2, 3, 8, 10, 17, 64, 100, 250, 264, 1000, 1023, 2048]
LONG = [2049, 4096, 4097]
LAYOUTS = ["transposed", "inner", "stepped", "offset"]


def logits(*sizes: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits_of(sizes, layout, dtype, RUNNER.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_team(classes, dtype, seed):
    rows = max(2, 300 // classes)
    check(ensemble_predict, logits(3, rows, classes, dtype=dtype))
    check(ensemble_predict, logits(1, 1, classes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("classes", LONG)
def test_long_rows(classes, dtype, seed):
    check(ensemble_predict, logits(2, 2, classes, dtype=dtype))


def test_as_many_classes_as_a_vocabulary(seed):
    check(ensemble_predict, logits(2, 1, 50257, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("classes", [40, 2056])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, classes, dtype, seed):
    """The same bits as of a contiguous copy, but for sums that other threads share."""
    view = logits(4, 3, classes, layout=layout, dtype=dtype)
    check(ensemble_predict, view)
    one_row, one_member = view[:, :1].expand(-1, 3, -1), view[:1].expand(4, -1, -1)
    check(ensemble_predict, one_row)
    found = check(ensemble_predict, one_member)
    for name in (1, 4, 5):  # members that are the same
        assert torch.equal(found[name], torch.zeros_like(found[name]))


@pytest.mark.parametrize("sizes", [(70, 2, 5), (9, 300, 33), (2, 1100, 4)])
def test_many_members_and_rows(sizes, seed):
    """More members than a team of a block has, more rows than a block."""
    check(ensemble_predict, logits(*sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("classes", [9, 300, 2200])
def test_each_gradient_alone(classes, dtype, seed):
    check_each_gradient_alone(ensemble_predict, logits(3, 5, classes, dtype=dtype))


@pytest.mark.parametrize("classes", [24, 2056])
def test_gradients_that_are_not_aligned(classes, seed):
    """Contiguous, but not from a multiple of 16 bytes on."""
    z = logits(3, 4, classes)
    results = ensemble_predict.fwd(z)
    grads = [torch.randn(t.shape, device=RUNNER.device) for t in results[:5]]
    shifted = [torch.empty(g.numel() + 1, device=RUNNER.device)[1:].view(g.shape).copy_(g) for g in grads]
    dlogits = ensemble_predict.bwd(z, results[0], *grads)
    torch.testing.assert_close(ensemble_predict.bwd(z, results[0], *shifted), dlogits)


@pytest.mark.parametrize("classes", [30, 600, 2300])
def test_the_first_of_equal_classes_wins(classes, seed):
    """Wherever they are: members with the same two best classes agree, those with one of them alone do not."""
    z = logits(3, 6, classes)
    for row in range(6):
        low, high = sorted(torch.randperm(classes)[:2].tolist())
        z[:, row, low], z[:, row, high] = 50, 50
        z[2, row, low] = 0
    disagreement = ensemble_predict.fwd(z)[5]
    torch.testing.assert_close(disagreement, torch.full_like(disagreement, 2 / 3))


@pytest.mark.parametrize("classes", [6, 500, 2100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_are_nan_and_no_others(bad, classes, seed):
    z = logits(3, 5, classes)
    z[1, 2, classes // 2] = bad
    results = ensemble_predict.fwd(z)
    grads = [torch.randn(t.shape, device=RUNNER.device) for t in results[:5]]
    dlogits = ensemble_predict.bwd(z, results[0], *grads)
    for result in (*results, dlogits.transpose(0, 1)):
        bad_rows = result.isnan().reshape(5, -1)
        assert bad_rows[2].all()
        assert not bad_rows[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("classes", [7, 2500])
def test_classes_that_cannot_be(classes, seed):
    """-inf adds nothing and has no gradient; a class that no member can have neither."""
    z = logits(4, 6, classes)
    z[torch.rand(z.shape) < 0.3] = float("-inf")
    z[:, :, 1], z[:, :, 0] = float("-inf"), 0
    found = check(ensemble_predict, z)
    assert (found[6][z.isneginf()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("given", [True, False], ids=["variances", "means alone"])
def test_regression(given, dtype, seed):
    for members, columns in [(1, 1), (5, 3), (4, 1000), (3, 1027), (30, 4100)]:
        means = torch.randn(members, columns, device=RUNNER.device).to(dtype)
        variances = torch.rand(members, columns, device=RUNNER.device).to(dtype) if given else None
        check_regression(regression, means, variances)
    means = torch.randn(24, 8, device=RUNNER.device).to(dtype)
    for view in (means.T, means[:, 1:], means[:, ::2], means[:1].expand(5, -1), means[1::3]):
        check_regression(regression, view, view.abs() if given else None)


def test_regression_gives_what_is_needed(seed):
    means, variances = torch.randn(3, 10, device=RUNNER.device), torch.rand(3, 10, device=RUNNER.device)
    mean = regression.fwd(means, variances)[0]
    grads = [torch.randn(10, device=RUNNER.device) for _ in range(4)]
    every = regression.bwd(means, mean, *grads, True, True)
    for need in ((True, False), (False, True), (False, False)):
        for alone, whole, needed in zip(regression.bwd(means, mean, *grads, *need), every, need, strict=True):
            assert torch.equal(alone, whole) if needed else alone.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_empty_batches(dtype):
    z = torch.empty(3, 0, 5, dtype=dtype, device=RUNNER.device)
    results = ensemble_predict.fwd(z)
    assert [tuple(t.shape) for t in results] == [(0, 5)] * 2 + [(0,)] * 4
    assert ensemble_predict.bwd(z, *results[:1], *results[:5]).shape == z.shape
    results = regression.fwd(z[..., 0], z[..., 1])
    assert [tuple(t.shape) for t in results] == [(0,)] * 4
    assert all(t.shape == (3, 0) for t in regression.bwd(z[..., 0], *results[:1], *results, True, True))


def test_the_same_bits_again(seed):
    for classes in (100, 2500):
        z = logits(5, 9, classes, dtype=torch.bfloat16)
        first, second = ensemble_predict.fwd(z), ensemble_predict.fwd(z)
        assert all(map(torch.equal, first, second))
        assert torch.equal(*(ensemble_predict.bwd(z, first[0], *first[:5]) for _ in range(2)))


def test_members_and_rows_further_apart_than_32_bits_reach(seed):
    near = logits(2, 3, 24, dtype=torch.bfloat16)
    storage = torch.empty(2**32 + 2**30, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    far = storage.as_strided(near.shape, (2**31 + 64, 2**30 + 8, 1)).copy_(near)
    results = ensemble_predict.fwd(near)
    assert all(map(torch.equal, ensemble_predict.fwd(far), results))
    grads = results[:5]
    assert torch.equal(ensemble_predict.bwd(far, results[0], *grads), ensemble_predict.bwd(near, results[0], *grads))
    means = regression.fwd(near[:, 0], None)
    assert all(map(torch.equal, regression.fwd(far[:, 0], None), means))


def test_bad_calls_of_the_schema():
    z = torch.zeros(2, 3, 4, device=RUNNER.device)
    mean, *_ = results = ensemble_predict.fwd(z)
    grads = list(results[:5])
    for bad in (z[0], z[:0], z[..., :0]):
        with pytest.raises(RuntimeError, match="logits should be"):
            ensemble_predict.fwd(bad)
    with pytest.raises(RuntimeError, match="take float32"):
        ensemble_predict.fwd(z.double())
    for place, bad in ((0, mean[1:]), (1, mean.T), (2, grads[2].double()), (4, grads[4][:2]), (3, mean)):
        wrong = [*grads[:place], bad, *grads[place + 1 :]]
        with pytest.raises(RuntimeError, match="should be contiguous float32"):
            ensemble_predict.bwd(z, mean, *wrong)
    with pytest.raises(RuntimeError, match="mean_probs should be"):
        ensemble_predict.bwd(z, mean.new_empty(0), *grads)
    with pytest.raises(RuntimeError, match="means should be"):
        regression.fwd(z, None)
    with pytest.raises(RuntimeError, match="variances does not fit"):
        regression.fwd(z[0], z[0].half())
    with pytest.raises(RuntimeError, match="grad_mean should be contiguous float32"):
        regression.bwd(z[0], mean[0], mean[0, 1:], *[mean[0]] * 3, True, True)


@pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")
def test_results_do_not_depend_on_the_order_of_threads(seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256(); ops = _native.cuda_ops\n"
        "for classes in (20, 700, 2300):\n"
        "    z = torch.randn(3, 2, classes)\n"
        "    results = ops.ensemble_predict_fwd(z)\n"
        "    for t in (*results, ops.ensemble_predict_bwd(z, results[0], *results[:5])):\n"
        "        digest.update(t.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    orders = "forward", "reverse", "1"
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=order) for order in orders]
    assert all(r.returncode == 0 for r in runs), runs
    assert len({r.stdout for r in runs}) == 1
