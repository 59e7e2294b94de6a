"""ensemble_predict: values and gradients against float64, extremes, PyTorch's machinery and bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from common import RUNNERS, Runner, name_of, runs
from torch import Tensor

from effens_kernels import Prediction, _dispatch, ensemble_predict
from effens_kernels.ops.ensemble_predict.autograd import bwd_op, fwd_op
from effens_kernels.testing import DTYPES, assert_accurate, strided

OP = "ensemble_predict"
FIELDS = Prediction._fields
HERE = [r for r in RUNNERS if _dispatch.IMPLEMENTED[OP].get(r.backend)]
every_runner = pytest.mark.parametrize("runner", [Runner("reference"), *HERE], ids=str, indirect=True)
RUNS = [*runs(*DTYPES, op=OP), *(pytest.param(d, Runner("reference"), id=f"{name_of(d)}-reference") for d in DTYPES)]
every_dtype = pytest.mark.parametrize(("dtype", "runner"), RUNS, indirect=["runner"])
# E, B, C and the layout: few classes, whose rows are lanes of the CPU engine, and many, which are lanes themselves.
CASES = [
    *((*sizes, "contiguous") for sizes in [(1, 1, 1), (3, 17, 1), (2, 29, 2), (5, 33, 10), (10, 1, 123), (37, 16, 3)]),
    *((4, 19, 21, layout) for layout in ("transposed", "inner", "stepped", "offset")),
    *((3, 2, 203, layout) for layout in ("transposed", "inner", "stepped", "offset")),
]
LARGE = [(40, 3, 5003, "contiguous"), (100, 70, 41, "transposed"), (2, 2, 30011, "contiguous")]  # beyond the cache


def definition(logits: Tensor) -> tuple[Tensor, ...]:
    """As the equations read, in the dtype of the results."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    entropy = -(mean * torch.where(mean > 0, mean, 1).log()).sum(-1)
    expected = -(p * log_p).sum(-1).mean(0)
    return mean, p.var(0, unbiased=False), entropy, expected, entropy - expected


def disagreement(logits: Tensor) -> Tensor:
    pairs = list(itertools.combinations(logits.argmax(-1), 2))
    return torch.stack([(a != b).double() for a, b in pairs]).mean(0) if pairs else torch.zeros(len(logits[0])).double()


def gradients_for(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.randn_like(t, dtype=torch.float64).to(t.dtype) for t in results[:5]]


def derivative(call, logits: Tensor, grads: list[Tensor]) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(call(logits)[:5], logits, grads)[0]


def compare(actual: Tensor, exact: Tensor, composition: Tensor, name: str, logits: Tensor) -> None:
    if logits.dtype == torch.float64:  # in which the definition is rounded itself
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13, msg=lambda m: f"{name}: {m}")
    else:
        assert_accurate(actual, exact, composition, name, logits.shape[-1])


def check(logits: Tensor, runner: Runner) -> None:
    def call(z):
        return ensemble_predict(z, backend=runner.backend)

    found = call(logits)
    exact, composition = definition(logits.double()), definition(logits)
    for name, actual, right, theirs in zip(FIELDS, found, exact, composition):
        compare(actual, right, theirs, name, logits)
    assert found.disagreement.dtype == found.entropy.dtype
    torch.testing.assert_close(
        found.disagreement.double().cpu(), disagreement(logits.double().cpu()), rtol=1e-6, atol=0
    )
    assert all(t.is_contiguous() for t in found)
    assert (found.mutual_information >= 0).all()
    grads = gradients_for(composition)
    exact = derivative(definition, logits.double(), [g.double() for g in grads])
    dlogits = derivative(call, logits, grads)
    compare(dlogits, exact, derivative(definition, logits, grads), "gradient", logits)


@every_dtype
def test_values_and_gradients(dtype, runner):
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for *sizes, layout in CASES[: 8 if runner.slow else None]:
        logits = 2 * strided(tuple(sizes), layout, generator, torch.float64, "cpu")
        check(logits.to(runner.device, dtype), runner)


@pytest.mark.parametrize("runner", [r for r in HERE if not r.slow], ids=str, indirect=True)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_beyond_the_cache(case, runner):
    generator = torch.Generator().manual_seed(torch.initial_seed())
    check(2 * strided(case[:3], case[3], generator, torch.float32, runner.device), runner)


@every_runner
def test_each_gradient_alone(runner):
    """And without the others, which are then not given."""
    logits = torch.randn(3, 5, 7, device=runner.device)
    for n, name in enumerate(FIELDS[:5]):
        leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        result = ensemble_predict(leaf, backend=runner.backend)[n]
        grad = torch.randn_like(result)
        actual = torch.autograd.grad(result, leaf, grad)[0]
        expected = torch.autograd.grad(definition(wide)[n], wide, grad.double())[0]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    found = ensemble_predict(leaf, backend=runner.backend)
    assert not found.disagreement.requires_grad


# --------------------------------------------------------------------------------------------------------- extremes


@every_runner
@pytest.mark.parametrize("classes", [7, 150])
def test_members_that_nearly_agree(runner, classes):
    """Where a difference of two entropies would be rounding errors."""
    logits = torch.randn(1, 20, classes) + 1e-3 * torch.randn(6, 20, classes)
    actual = ensemble_predict(logits.to(runner.device), backend=runner.backend).mutual_information.double().cpu()
    exact = definition(logits.double())[4]
    assert (exact < 1e-6).all()
    torch.testing.assert_close(actual, exact, rtol=2e-3, atol=1e-10)
    same = logits[:1].expand(5, -1, -1).to(runner.device)
    found = ensemble_predict(same, backend=runner.backend)
    assert ((found.mutual_information >= 0) & (found.mutual_information < 1e-11)).all()
    assert (found.disagreement == 0).all()


@every_runner
def test_members_far_apart(runner):
    """Each sure of another class: all there is to know is which member is right."""
    logits = 1e4 * torch.eye(4, device=runner.device).unsqueeze(1).expand(4, 3, 4)
    found = ensemble_predict(logits, backend=runner.backend)
    torch.testing.assert_close(found.mutual_information.cpu(), torch.full((3,), math.log(4)))
    torch.testing.assert_close(found.mean_probs.cpu(), torch.full((3, 4), 0.25))
    assert (found.expected_entropy == 0).all()
    assert (found.disagreement == 1).all()


@every_runner
@pytest.mark.parametrize("size", [30, 1e4, 3e38, 1e-30])
def test_large_and_small_logits(runner, size):
    logits = size * torch.randn(3, 17, 5).clamp(-1, 1)
    found = ensemble_predict(logits.to(runner.device), backend=runner.backend)
    exact = (*definition(logits.double()), disagreement(logits))
    for name, actual, right in zip(FIELDS, found, exact):
        torch.testing.assert_close(
            actual.double().cpu(), right, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    grads = gradients_for(found)
    dlogits = derivative(lambda z: ensemble_predict(z, backend=runner.backend), logits.to(runner.device), grads)
    exact = derivative(definition, logits.double(), [g.double().cpu() for g in grads])
    torch.testing.assert_close(dlogits.double().cpu(), exact, rtol=1e-4, atol=1e-5)


@every_runner
@pytest.mark.parametrize("classes", [6, 203])
def test_classes_that_cannot_be(runner, classes):
    """A logit of -inf, in all members or in one, is as if the class were not there."""
    logits = torch.randn(3, 5, classes, dtype=torch.float32)
    logits[:, :, 2] = -math.inf
    without = logits[..., [c for c in range(classes) if c != 2]]

    def call(z):
        return ensemble_predict(z.to(runner.device), backend=runner.backend)

    found, expected = call(logits), call(without)
    for name, actual, right in zip(FIELDS[2:], found[2:], expected[2:]):
        torch.testing.assert_close(actual, right, msg=lambda m, n=name: f"{n}: {m}")
    assert (found.mean_probs[:, 2] == 0).all()
    assert (found.variance[:, 2] == 0).all()
    grads = gradients_for(found)
    dlogits = derivative(call, logits, grads)
    assert (dlogits[..., 2] == 0).all()
    others = [c for c in range(classes) if c != 2]
    expected = derivative(call, without, [g[:, others] if g.dim() == 2 else g for g in grads])
    torch.testing.assert_close(dlogits[..., others], expected)

    logits[1:, :, 2] = torch.randn(2, 5)  # one member alone is sure that it is not this class
    p = logits.double().softmax(-1)
    found = call(logits)
    torch.testing.assert_close(found.mean_probs.double().cpu(), p.mean(0), rtol=1e-5, atol=1e-7)
    exact = torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
    torch.testing.assert_close(found.mutual_information.double().cpu(), exact, rtol=1e-4, atol=1e-6)
    dlogits = derivative(call, logits, grads)
    assert dlogits.isfinite().all()
    assert (dlogits[0, :, 2] == 0).all()


@every_runner
@pytest.mark.parametrize("classes", [6, 203])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_bad_rows_are_nan_and_others_are_not(runner, classes, bad):
    logits = torch.randn(3, 20, classes, device=runner.device)
    expected = ensemble_predict(logits, backend=runner.backend)
    grads = gradients_for(expected)

    def call(z):
        return ensemble_predict(z, backend=runner.backend)

    expected_gradient = derivative(call, logits, grads)
    logits[1, 4, slice(None) if bad == "all -inf" else classes - 1] = -math.inf if bad == "all -inf" else bad
    found, others = call(logits), [b for b in range(20) if b != 4]
    for name, actual, right in zip(FIELDS, found, expected):
        assert actual[4].isnan().all(), name
        assert torch.equal(actual[others], right[others]), name
    gradient = derivative(call, logits, grads)
    assert gradient[1, 4].isnan().all()
    assert torch.equal(gradient[:, others], expected_gradient[:, others])


@every_runner
def test_ties_are_the_first_class(runner):
    logits = torch.zeros(3, 3, 40)  # undecided: class 0
    logits[1, 1, 0] = -1  # class 1
    logits[2, 2, [17, 33]] = 2  # class 17
    logits[1, 2, 17] = 2
    found = ensemble_predict(logits.to(runner.device), backend=runner.backend).disagreement.cpu()
    torch.testing.assert_close(found, torch.tensor([0, 2 / 3, 2 / 3]))


@every_runner
def test_one_member(runner):
    logits = torch.randn(1, 9, 4, device=runner.device)
    found = ensemble_predict(logits, backend=runner.backend)
    torch.testing.assert_close(found.mean_probs, logits[0].softmax(-1))
    for name in ("variance", "mutual_information", "disagreement"):
        assert (getattr(found, name) == 0).all(), name


@every_runner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_empty_batch(runner, dtype):
    logits = torch.randn(3, 0, 4, device=runner.device).to(dtype).requires_grad_()
    found = ensemble_predict(logits, backend=runner.backend)
    assert [list(t.shape) for t in found] == [[0, 4]] * 2 + [[0]] * 4
    assert all(t.dtype == torch.float32 for t in found)
    (gradient,) = torch.autograd.grad(sum(t.sum() for t in found), logits)
    assert gradient.shape == logits.shape
    assert gradient.dtype == dtype


@every_runner
def test_any_number_of_batch_axes(runner):
    logits = torch.randn(3, 2, 4, 5, 6, device=runner.device)
    expected = ensemble_predict(logits.flatten(1, 3), backend=runner.backend)
    found = ensemble_predict(logits, backend=runner.backend)
    for actual, right in zip(found, expected):
        assert torch.equal(actual, right.view(2, 4, 5, *right.shape[1:]))
    single = ensemble_predict(logits[:, 0, 0, 0], backend=runner.backend)
    for actual, right in zip(single, expected):
        torch.testing.assert_close(actual, right[0])


@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (300, 300)])
def test_same_bits_for_any_number_of_threads(rows, classes, threads):
    logits = torch.randn(4, rows, classes)
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaf = logits.clone().requires_grad_()
        found = ensemble_predict(leaf, backend="cpu")
        total = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found[:5])
        results.append((*found, *torch.autograd.grad(total, leaf)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---------------------------------------------------------------------------------------------- PyTorch's machinery


@pytest.mark.parametrize("runner", [r for r in HERE if r.isa in (None, "baseline")], ids=str, indirect=True)
def test_saved_bytes(runner):
    """The logits, as they lie in memory, and mean_probs."""
    stored = torch.randn(5, 3, 7, device=runner.device).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        found = ensemble_predict(stored.transpose(0, 1), backend=runner.backend)
    assert {t.data_ptr() for t in kept} == {stored.data_ptr(), found.mean_probs.data_ptr()}
    assert sum(t.nbytes for t in kept) == stored.nbytes + found.mean_probs.nbytes


def differentiable(backend):
    return lambda logits: ensemble_predict(logits, backend=backend)[:5]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("sizes", [(3, 2, 4), (1, 2, 1)], ids=str)
def test_gradcheck(backend, sizes):
    logits = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(differentiable(backend), logits)
    assert torch.autograd.gradcheck(differentiable(backend), logits, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(differentiable(backend), logits)


def test_second_derivatives_where_a_class_cannot_be():
    logits = torch.randn(3, 2, 4, dtype=torch.float64)
    logits[:, 0, 1] = -math.inf
    logits[1, 1, 2] = -math.inf
    logits.requires_grad_()
    total = sum(t.square().sum() for t in differentiable("cpu")(logits))
    (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    assert second.isfinite().all()
    assert (second[:, 0, 1] == 0).all()


def test_opcheck():
    logits = torch.randn(3, 4, 5, requires_grad=True)
    torch.library.opcheck(fwd_op, (logits, "cpu"))
    found = [t.detach() for t in fwd_op(logits, "cpu")]
    torch.library.opcheck(bwd_op, (logits, found[0].requires_grad_(), *found[:5], "cpu"))
    nothing = logits.detach().new_empty(0)
    torch.library.opcheck(bwd_op, (logits.detach().bfloat16(), found[0].detach(), *(nothing,) * 4, found[4], "cpu"))


def test_compiled_is_one_graph_of_any_batch():
    torch._dynamo.reset()
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph

    def loss(logits):
        found = ensemble_predict(logits.transpose(0, 1), backend="cpu")
        return found.entropy.sum() + (found.mean_probs * found.variance).sum() - 2 * found.mutual_information.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(loss, fullgraph=True, backend=counting, dynamic=True)
    for batch in (5, 8, 33):
        logits = torch.randn(batch, 3, 4, requires_grad=True)
        torch.testing.assert_close(compiled(logits), loss(logits))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(logits), logits), torch.autograd.grad(loss(logits), logits)
        )
        counted(logits)
    assert len(calls) == 1


def test_compiled_returns_a_prediction():
    torch._dynamo.reset()
    logits = torch.randn(3, 6, 4)
    found = torch.compile(ensemble_predict, fullgraph=True, backend="aot_eager")(logits)
    assert isinstance(found, Prediction)
    for actual, right in zip(found, ensemble_predict(logits)):
        assert torch.equal(actual, right)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, logits):
            found = ensemble_predict(logits)
            return found.mean_probs, found.mutual_information

    example = torch.randn(3, 6, 4)
    exported = torch.export.export(
        Model(), (example,), dynamic_shapes={"logits": {1: torch.export.Dim("batch", min=2)}}
    )
    logits = torch.randn(3, 11, 4)
    for actual, right in zip(exported.module()(logits), Model()(logits)):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("axis", range(4))
def test_vmap(axis):
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64).movedim(0, axis)
    found = torch.func.vmap(differentiable("cpu"), in_dims=axis)(logits)
    for v in range(2):
        for actual, right in zip(found, differentiable("reference")(logits.select(axis, v))):
            torch.testing.assert_close(actual[v], right)


def test_vmap_of_gradients():
    logits, weights = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

    def loss(backend):
        def value(logits, weight):
            found = ensemble_predict(logits, backend=backend)
            return (weight * found.mutual_information).sum() + found.mean_probs.square().sum()

        return value

    for dims in ((0, 0), (0, None), (None, 0)):
        given = tuple(t if d == 0 else t[0] for t, d in zip((logits, weights), dims))
        actual = torch.func.vmap(torch.func.grad(loss("cpu")), dims)(*given)
        expected = torch.func.vmap(torch.func.grad(loss("reference")), dims)(*given)
        torch.testing.assert_close(actual, expected)
    actual = torch.func.jacrev(torch.func.grad(loss("cpu")))(logits[0], weights[0])
    expected = torch.func.jacrev(torch.func.grad(loss("reference")))(logits[0], weights[0])
    torch.testing.assert_close(actual, expected)


def test_autocast_changes_nothing():
    """As of softmax, which runs in float32."""
    logits = torch.randn(3, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = ensemble_predict(logits)
    for actual, right in zip(found, ensemble_predict(logits)):
        assert torch.equal(actual, right)


def test_meta():
    found = ensemble_predict(torch.empty(3, 6, 4, dtype=torch.float16, device="meta"))
    assert [(list(t.shape), t.dtype) for t in found] == [([6, 4], torch.float32)] * 2 + [([6], torch.float32)] * 4


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("logits", "error", "words"),
    [
        ([1.0], TypeError, "a torch.Tensor, got list [1.0]"),
        (torch.ones(2, 3, 4).long(), TypeError, "a float32, float16, bfloat16 or float64 tensor, got int64[2, 3, 4]"),
        (torch.ones(3), ValueError, "[E, *batch, C], got float32[3] on cpu"),
        (torch.ones(0, 3, 4), ValueError, "[E, *batch, C] of at least one member, got float32[0, 3, 4] on cpu"),
        (torch.ones(2, 3, 0), ValueError, "[E, *batch, C] of at least one class, got float32[2, 3, 0] on cpu"),
    ],
    ids=["list", "int", "rank", "no_members", "no_classes"],
)
def test_bad_input(logits, error, words):
    with pytest.raises(error) as raised:
        ensemble_predict(logits)
    assert str(raised.value).startswith(f"{OP}: logits should be {words}")


def test_bad_backend():
    with pytest.raises(ValueError, match="ensemble_predict: backend should be None or one of"):
        ensemble_predict(torch.ones(2, 3, 4), backend="gpu")


def test_extension_checks_for_itself():
    from effens_kernels.ops.ensemble_predict import native

    logits, nothing = torch.randn(2, 3, 4), torch.empty(0)
    mean = native.fwd(logits)[0]
    for bad in (logits[0], logits[:0], logits[..., :0], logits.long()):
        with pytest.raises(RuntimeError, match="ensemble_predict_fwd"):
            native.fwd(bad)
    for wrong in (mean[:2], mean.double(), mean.mT.contiguous().mT, mean[0]):
        with pytest.raises(RuntimeError, match="mean_probs should be contiguous and fit"):
            native.bwd(logits, wrong, mean, *(nothing,) * 4)
        with pytest.raises(RuntimeError, match="grad_mean should be contiguous and fit"):
            native.bwd(logits, mean, wrong, *(nothing,) * 4)
        with pytest.raises(RuntimeError, match="grad_entropy should be contiguous and fit"):
            native.bwd(logits, mean, nothing, nothing, wrong, nothing, nothing)


def test_reference_runs_by_itself_where_nothing_else_can(monkeypatch):
    monkeypatch.setitem(_dispatch.PREFERENCE, "cpu", ("reference",))
    logits = torch.randn(3, 6, 4)
    torch.testing.assert_close(ensemble_predict(logits), ensemble_predict(logits, backend="reference"), rtol=0, atol=0)
