"""ensemble_predict_regression: values and gradients against float64, PyTorch's machinery and bad input."""

from __future__ import annotations

import pytest
import torch
from common import RUNNERS, Runner, name_of, runs
from torch import Tensor

from effens_kernels import RegressionPrediction, _dispatch, ensemble_predict_regression
from effens_kernels.ops.ensemble_predict_regression.autograd import bwd_op, fwd_op
from effens_kernels.testing import DTYPES, assert_accurate, strided

OP = "ensemble_predict_regression"
FIELDS = RegressionPrediction._fields
HERE = [r for r in RUNNERS if _dispatch.IMPLEMENTED[OP].get(r.backend)]
RUNS = [*runs(*DTYPES, op=OP), *(pytest.param(d, Runner("reference"), id=f"{name_of(d)}-reference") for d in DTYPES)]
every_dtype = pytest.mark.parametrize(("dtype", "runner"), RUNS, indirect=["runner"])
every_runner = pytest.mark.parametrize("runner", [Runner("reference"), *HERE], ids=str, indirect=True)
CASES = [
    *((*sizes, "contiguous") for sizes in [(1, 1), (3, 17), (2, 100), (11, 131)]),
    *((4, 37, layout) for layout in ("transposed", "stepped", "offset")),
]


def definition(means: Tensor, variances: Tensor | None = None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(means.dtype, torch.float32)
    means = means.to(wide)
    epistemic = means.var(0, unbiased=False)
    aleatoric = torch.zeros_like(epistemic) if variances is None else variances.to(wide).mean(0)
    return means.mean(0), aleatoric + epistemic, aleatoric, epistemic


def derivatives(call, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    results, grads = zip(*((r, g) for r, g in zip(call(*leaves), grads) if r.requires_grad))
    return torch.autograd.grad(results, leaves, grads)


@every_dtype
@pytest.mark.parametrize("given", [True, False], ids=["variances", "means alone"])
def test_values_and_gradients(dtype, runner, given):
    generator = torch.Generator().manual_seed(torch.initial_seed())

    def call(*tensors):
        return ensemble_predict_regression(*tensors, backend=runner.backend)

    for members, columns, layout in CASES:
        draw = [strided((members, columns), layout, generator, torch.float64, "cpu") for _ in range(2)]
        inputs = [t.to(runner.device, dtype) for t in (draw[0], draw[1].square())[: 1 + given]]
        wide = [t.double() for t in inputs]
        found, exact, composition = call(*inputs), definition(*wide), definition(*inputs)
        for name, actual, right, theirs in zip(FIELDS, found, exact, composition):
            assert_accurate(actual, right, theirs, name, members)
        grads = [torch.randn_like(t) for t in found]
        exact = derivatives(definition, wide, [g.double() for g in grads])
        composition = derivatives(definition, inputs, grads)
        for name, *three in zip(("means", "variances"), derivatives(call, inputs, grads), exact, composition):
            assert_accurate(*three, name, members)


@every_runner
def test_each_gradient_alone(runner):
    """Of each result, with respect to each argument, without what else there is."""
    means, variances = torch.randn(3, 11, device=runner.device), torch.rand(3, 11, device=runner.device)
    for n in range(4):
        for argument in range(2):
            given = [t.clone().requires_grad_(k == argument) for k, t in enumerate((means, variances))]
            wide = [t.detach().double().requires_grad_(k == argument) for k, t in enumerate(given)]
            result, right = ensemble_predict_regression(*given, backend=runner.backend)[n], definition(*wide)[n]
            if not right.requires_grad:
                continue
            grad = torch.randn_like(result)
            actual = torch.autograd.grad(result, given[argument], grad, materialize_grads=True)[0]
            expected = torch.autograd.grad(right, wide[argument], grad.double(), materialize_grads=True)[0]
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@every_runner
def test_an_offset_costs_no_precision(runner):
    """E[x^2] - E[x]^2 would be 0 here, or negative."""
    means = 1e4 + torch.randn(8, 50, device=runner.device)
    found = ensemble_predict_regression(means, backend=runner.backend)
    torch.testing.assert_close(found.epistemic.double(), means.double().var(0, unbiased=False), rtol=1e-3, atol=1e-5)
    assert (found.aleatoric == 0).all()
    assert torch.equal(found.variance, found.epistemic)


@every_runner
def test_sizes_of_batches(runner):
    means = torch.randn(3, 2, 4, 5, device=runner.device)
    expected = ensemble_predict_regression(means.flatten(1), means.flatten(1).square(), backend=runner.backend)
    found = ensemble_predict_regression(means, means.square(), backend=runner.backend)
    for actual, right in zip(found, expected):
        assert torch.equal(actual, right.view(2, 4, 5))
    single = ensemble_predict_regression(means[:, 0, 0, 0], backend=runner.backend)
    assert torch.equal(single.mean, found.mean[0, 0, 0])
    empty = torch.empty(3, 0, 5, device=runner.device, dtype=torch.float16, requires_grad=True)
    found = ensemble_predict_regression(empty, empty, backend=runner.backend)
    assert all(t.shape == (0, 5) and t.dtype == torch.float32 for t in found)
    assert torch.autograd.grad(found.variance.sum(), empty)[0].shape == empty.shape


def test_same_bits_for_any_number_of_threads(threads):
    means, variances = torch.randn(16, 30_011), torch.rand(16, 30_011)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ensemble_predict_regression(means, variances, backend="cpu"))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# ---------------------------------------------------------------------------------------------- PyTorch's machinery


def of(backend):
    return lambda *tensors: tuple(ensemble_predict_regression(*tensors, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    means = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    variances = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    for inputs in ((means, variances), (means, variances.detach()), (means.detach(), variances)):
        assert torch.autograd.gradcheck(of(backend), inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(of(backend), inputs)


def test_opcheck():
    means, variances = torch.randn(3, 4, requires_grad=True), torch.rand(3, 4, requires_grad=True)
    torch.library.opcheck(fwd_op, (means, variances, "cpu"))
    torch.library.opcheck(fwd_op, (means, None, "cpu"))
    found = [t.detach() for t in fwd_op(means, variances, "cpu")]
    torch.library.opcheck(bwd_op, (means, found[0].requires_grad_(), *found, True, True, "cpu"))
    nothing = means.detach().new_empty(0)
    torch.library.opcheck(bwd_op, (means.detach(), found[0].detach(), found[1], *(nothing,) * 3, True, False, "cpu"))


@pytest.mark.parametrize("given", [True, False], ids=["variances", "means alone"])
def test_compiled_and_exported(given):
    torch._dynamo.reset()

    def loss(means, variances=None):
        found = ensemble_predict_regression(means.mT, None if variances is None else variances.mT, backend="cpu")
        return (found.mean * found.variance).sum() + found.epistemic.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 17):
        inputs = [torch.rand(batch, 3, requires_grad=True) for _ in range(1 + given)]
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))
        expected = torch.autograd.grad(loss(*inputs), inputs)
        torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)

    class Model(torch.nn.Module):
        def forward(self, means, variances=None):
            return ensemble_predict_regression(means, variances).variance

    inputs = [torch.rand(3, 6) for _ in range(1 + given)]
    shapes = tuple({1: torch.export.Dim("batch", min=2)} for _ in inputs)
    exported = torch.export.export(Model(), tuple(inputs), dynamic_shapes=shapes).module()
    inputs = [torch.rand(3, 11) for _ in range(1 + given)]
    assert torch.equal(exported(*inputs), Model()(*inputs))


def test_vmap():
    means, variances = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(3, 5, 2, dtype=torch.float64)
    for dims in ((0, 2), (0, None), (None, 2)):
        given = [t if d is not None else t.select(k, 0) for t, d, k in zip((means, variances), dims, (0, 2))]
        found = torch.func.vmap(of("cpu"), dims)(*given)
        expected = torch.func.vmap(of("reference"), dims)(*given)
        torch.testing.assert_close(found, expected)

        def loss(backend):
            return lambda *both: sum(weight * r.square().sum() for weight, r in enumerate(of(backend)(*both), 1))

        gradients = [torch.func.vmap(torch.func.grad(loss(b), (0, 1)), dims)(*given) for b in ("cpu", "reference")]
        torch.testing.assert_close(*gradients)


# --------------------------------------------------------------------------------------------------------- bad input


GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0],), TypeError, "means should be a torch.Tensor, got list [1.0]"),
        (
            (GOOD.int(),),
            TypeError,
            "means should be a float32, float16, bfloat16 or float64 tensor, got int32[2, 3] on cpu",
        ),
        ((torch.ones(()),), ValueError, "means should be [E, *batch], got float32[] on cpu"),
        ((GOOD[:0],), ValueError, "means should be [E, *batch] of at least one member, got float32[0, 3] on cpu"),
        ((GOOD, 1.0), TypeError, "variances should be a torch.Tensor, got float 1.0"),
        ((GOOD, GOOD.double()), TypeError, "variances should be torch.float32 like means, got float64[2, 3] on cpu"),
        ((GOOD, GOOD[:1]), ValueError, "variances should be [2, 3] like means, got float32[1, 3] on cpu"),
        ((GOOD, GOOD.to("meta")), ValueError, "variances should be on cpu like means, got float32[2, 3] on meta"),
    ],
    ids=["list", "int", "rank", "no_members", "number", "dtype", "shape", "device"],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error) as raised:
        ensemble_predict_regression(*arguments)
    assert str(raised.value) == f"{OP}: {words}"


def test_extension_checks_for_itself():
    from effens_kernels.ops.ensemble_predict_regression import native

    nothing = torch.empty(0)
    for bad in (GOOD[0], GOOD[:0], GOOD.long()):
        with pytest.raises(RuntimeError, match="ensemble_predict_regression_fwd"):
            native.fwd(bad, None)
    for bad in (GOOD[:, :2], GOOD.double()):
        with pytest.raises(RuntimeError, match="variances does not fit"):
            native.fwd(GOOD, bad)
    mean = native.fwd(GOOD, None)[0]
    for bad in (mean[:2], mean.double()):
        with pytest.raises(RuntimeError, match="mean should be contiguous and fit"):
            native.bwd(GOOD, bad, mean, *(nothing,) * 3, True, True)
        with pytest.raises(RuntimeError, match="grad_epistemic should be contiguous and fit"):
            native.bwd(GOOD, mean, *(nothing,) * 3, bad, True, True)
