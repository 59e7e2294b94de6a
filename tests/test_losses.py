"""Losses of ensembles: equal to a loop over the members with torch's own losses; bootstrap weights; bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from common import name_of
from torch import Tensor

from effens_kernels import losses
from effens_kernels.testing import DTYPES

E, B, C = 4, 37, 6
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
per_member = pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per_member"])
kinds = pytest.mark.parametrize("kind", ["classes", "probabilities"])


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def target_of(kind: str, per_member: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (E, B) if per_member else (B,)
    if kind == "classes":
        return torch.randint(C, shape)
    return torch.randn(*shape, C, dtype=torch.float64).softmax(-1).to(dtype)


def member(value, e: int, axes: int):
    """Of what all members share, or each has of its own."""
    return value[e] if isinstance(value, Tensor) and value.dim() == axes + 1 else value


def check(call, predictions: Tensor, loop: Tensor, elements: Tensor) -> None:
    """Every reduction, and gradients with those of each member alone; `loop` [E], `elements` are the losses."""
    assert_close = torch.testing.assert_close
    assert_close(call(reduction="members"), loop)
    assert_close(call(), loop.mean())
    assert_close(call(reduction="sum"), loop.sum())
    assert_close(call(reduction="none"), elements)
    (expected,) = torch.autograd.grad(loop.sum(), predictions)
    low = predictions.dtype in (torch.float16, torch.bfloat16)
    tolerance = {"rtol": 2 * torch.finfo(predictions.dtype).eps, "atol": 1e-6} if low else {}
    assert_close(torch.autograd.grad(call(reduction="sum"), predictions)[0], expected, **tolerance)
    assert_close(torch.autograd.grad(call(), predictions)[0], expected / E, **tolerance)


# -------------------------------------------------------------------------------------------------- cross-entropy


@dtypes
@kinds
@per_member
@pytest.mark.parametrize("smoothing", [0.0, 0.1, "each"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
def test_cross_entropy_is_a_loop(dtype, kind, per_member, smoothing, weighted):
    logits = torch.randn(E, B, C).to(dtype).requires_grad_()
    target = target_of(kind, per_member, wide(logits).dtype)
    if kind == "classes":
        target[..., 3:9] = -100
    class_weight = torch.rand(C, dtype=wide(logits).dtype) if weighted else None
    smoothings = torch.rand(E) if smoothing == "each" else None

    def call(**options):
        value = smoothing if smoothings is None else smoothings
        options = {"class_weight": class_weight, "label_smoothing": value, **options}
        return losses.ensemble_cross_entropy(logits, target, **options)

    def alone(e: int, reduction: str) -> Tensor:
        value = smoothing if smoothings is None else smoothings[e].item()
        own = member(target, e, 1 if kind == "classes" else 2)
        options = {"weight": class_weight, "label_smoothing": value, "reduction": reduction}
        return F.cross_entropy(wide(logits[e]), own, **options)

    loop, elements = (torch.stack([alone(e, reduction) for e in range(E)]) for reduction in ("mean", "none"))
    check(call, logits, loop, elements)


@kinds
@per_member
@pytest.mark.parametrize("weights_per_member", [False, True], ids=["same_rows", "own_rows"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
def test_row_weights_repeat_rows(kind, per_member, weights_per_member, weighted):
    logits = torch.randn(E, B, C, dtype=torch.float64, requires_grad=True)
    target = target_of(kind, per_member)
    if kind == "classes":
        target[..., 3:9] = 2
    counts = torch.randint(4, (E, B) if weights_per_member else (B,))
    class_weight = torch.rand(C, dtype=torch.float64) if weighted else None

    def call(**options):
        options = {
            "row_weight": counts,
            "class_weight": class_weight,
            "ignore_index": 2,
            "label_smoothing": 0.2,
        } | options
        return losses.ensemble_cross_entropy(logits, target, **options)

    def alone(e: int) -> tuple[Tensor, Tensor]:
        own, times = member(target, e, 1 if kind == "classes" else 2), member(counts, e, 1)
        options = {"weight": class_weight, "ignore_index": 2 if kind == "classes" else -100, "label_smoothing": 0.2}
        repeated = [t.repeat_interleave(times, 0) for t in (logits[e], own)]
        return F.cross_entropy(*repeated, **options), F.cross_entropy(
            logits[e], own, reduction="none", **options
        ) * times

    loop, elements = map(torch.stack, zip(*map(alone, range(E))))
    check(call, logits, loop, elements)


def test_more_axes():
    """Tokens of sequences: rows are all of them."""
    logits, target = torch.randn(3, 4, 5, C), torch.randint(C, (4, 5))
    weight = torch.rand(3, 4, 5)
    found = losses.ensemble_cross_entropy(logits, target, row_weight=weight, reduction="none")
    flat = losses.ensemble_cross_entropy(
        logits.flatten(1, 2), target.flatten(), row_weight=weight.flatten(1), reduction="none"
    )
    torch.testing.assert_close(found, flat.view(3, 4, 5))
    torch.testing.assert_close(
        losses.ensemble_cross_entropy(logits[:, 0, 0], target[0, 0]),
        F.cross_entropy(logits[:, 0, 0], target[0, 0].expand(3)),
    )


def test_members_are_not_coupled():
    """Unlike in the loss of the mean prediction."""
    logits, target = torch.randn(E, B, C, requires_grad=True), torch.randint(C, (B,))
    changed = torch.cat([logits[:1], torch.randn(E - 1, B, C)]).detach().requires_grad_()
    first, second = (torch.autograd.grad(losses.ensemble_cross_entropy(z, target), z)[0][0] for z in (logits, changed))
    assert torch.equal(first, second)
    of_mean = F.nll_loss(logits.softmax(-1).mean(0).log(), target)
    assert losses.ensemble_cross_entropy(logits, target) > of_mean


def test_extremes():
    logits = torch.randn(2, 3, C)
    logits[:, :, 5] = -math.inf
    target = torch.tensor([0, 1, 5])  # of the last row, the loss is inf
    assert losses.ensemble_cross_entropy(logits, target).item() == math.inf
    leaf = logits.clone().requires_grad_()
    drawn = torch.tensor([2.0, 1.0, 0.0])  # it is not in the sample
    loss = losses.ensemble_cross_entropy(leaf, target, row_weight=drawn, reduction="members")
    expected = torch.stack([F.cross_entropy(z[[0, 0, 1]], target[[0, 0, 1]]) for z in logits])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient[:, 2] == 0).all()
    smoothing = torch.tensor([0.0, 0.5])
    found = losses.ensemble_cross_entropy(logits, torch.zeros(3).long(), label_smoothing=smoothing, reduction="members")
    torch.testing.assert_close(found, torch.tensor([F.cross_entropy(logits[0], torch.zeros(3).long()), math.inf]))


def test_members_without_rows():
    logits, target = torch.randn(2, 3, C, requires_grad=True), torch.randint(C, (3,))
    weight = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    found = losses.ensemble_cross_entropy(logits, target, row_weight=weight, reduction="members")
    assert found[1] == 0
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()
    ignored = losses.ensemble_cross_entropy(logits, torch.full((3,), -100), reduction="members")
    assert ignored.isnan().all()  # as torch's
    assert losses.ensemble_cross_entropy(torch.randn(2, 0, C), torch.empty(0).long(), reduction="none").shape == (2, 0)


# ----------------------------------------------------------------------------------------------------- regression


@dtypes
@per_member
@pytest.mark.parametrize("outputs", [(), (3, 2)], ids=str)
@pytest.mark.parametrize("name", ["mse", "gaussian_nll", "gaussian_nll_full"])
def test_regression_losses_are_a_loop(dtype, per_member, outputs, name):
    means = torch.randn(E, B, *outputs).to(dtype).requires_grad_()
    target = torch.randn(*((E,) if per_member else ()), B, *outputs).to(dtype)
    variances = (0.1 + torch.rand(E, B, *outputs)).to(dtype)
    if dtype in (torch.float32, torch.float64):  # in others, gradients would be beyond their range
        variances[:, 0] = 1e-9  # below eps
    variances.requires_grad_()

    def ours(**options):
        if name == "mse":
            return losses.ensemble_mse(means, target, **options)
        return losses.ensemble_gaussian_nll(means, variances, target, full=name.endswith("full"), **options)

    def alone(e: int, reduction: str) -> Tensor:
        own = wide(member(target, e, 1 + len(outputs)))
        if name == "mse":
            return F.mse_loss(wide(means[e]), own, reduction=reduction)
        options = {"full": name.endswith("full"), "reduction": reduction}
        return F.gaussian_nll_loss(wide(means[e]), own, wide(variances[e]), **options)

    loop, elements = (torch.stack([alone(e, reduction) for e in range(E)]) for reduction in ("mean", "none"))
    for predictions in (means,) if name == "mse" else (means, variances):
        check(lambda **options: ours(**options), predictions, loop.clone(), elements)
        loop = torch.stack([alone(e, "mean") for e in range(E)])


@pytest.mark.parametrize("outputs", [(), (3,)], ids=str)
def test_row_weights_repeat_rows_of_regression(outputs):
    means, variances = torch.randn(E, B, *outputs), torch.rand(E, B, *outputs) + 0.1
    target, counts = torch.randn(B, *outputs), losses.bootstrap_weights(E, B)
    times = counts.long()
    found = losses.ensemble_gaussian_nll(means, variances, target, row_weight=counts, reduction="members")
    square = losses.ensemble_mse(means, target, row_weight=counts, reduction="members")
    for e in range(E):
        mean, own, variance = (t.repeat_interleave(times[e], 0) for t in (means[e], target, variances[e]))
        torch.testing.assert_close(found[e], F.gaussian_nll_loss(mean, own, variance))
        torch.testing.assert_close(square[e], F.mse_loss(mean, own))
    assert (losses.ensemble_mse(means, target, row_weight=torch.zeros(B), reduction="members") == 0).all()


# ------------------------------------------------------------------------------------------------------ bootstrap


@pytest.mark.parametrize("method", losses.METHODS)
def test_bootstrap_weights(method):
    counts = losses.bootstrap_weights(50, 2000, method=method)
    assert counts.dtype == torch.float32
    assert (counts == counts.round()).all()
    assert (counts >= 0).all()
    assert abs(counts.mean().item() - 1) < 0.03
    assert abs(counts.var().item() - 1) < 0.05  # of each: the bootstrap's is 1 - 1/B
    absent = (counts == 0).double().mean().item()
    assert abs(absent - (0.5 if method == "double_or_nothing" else math.exp(-1))) < 0.02
    if method == "multinomial":
        assert (counts.sum(1) == 2000).all()
    if method == "double_or_nothing":
        assert set(counts.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(counts[0], counts[1])
    same = [
        losses.bootstrap_weights(3, 20, method=method, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        for _ in range(2)
    ]
    assert torch.equal(*same)
    assert same[0].dtype == torch.float64
    assert losses.bootstrap_weights(3, 0, method=method).shape == (3, 0)
    assert losses.bootstrap_weights(0, 3, method=method).shape == (0, 3)


# ---------------------------------------------------------------------------------------------- PyTorch's machinery


@kinds
def test_compiled_is_one_graph(kind):
    torch._dynamo.reset()
    logits, target = torch.randn(E, B, C, requires_grad=True), target_of(kind, False, torch.float32)
    weight = losses.bootstrap_weights(E, B)

    def loss(logits):
        options = {"row_weight": weight, "class_weight": torch.arange(1.0, C + 1), "label_smoothing": 0.1}
        return losses.ensemble_cross_entropy(logits, target, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss(logits))
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits), torch.autograd.grad(loss(logits), logits))

    def regression(means):
        return losses.ensemble_gaussian_nll(means, means.square() + 0.1, means[0].detach(), row_weight=weight)

    means = torch.randn(E, B)
    compiled = torch.compile(regression, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(means), regression(means))


def test_vmap_and_gradcheck():
    logits, target = torch.randn(3, 2, 5, C, dtype=torch.float64), torch.randint(C, (5,))
    found = torch.func.vmap(lambda z: losses.ensemble_cross_entropy(z, target))(logits)
    torch.testing.assert_close(found, torch.stack([losses.ensemble_cross_entropy(z, target) for z in logits]))
    leaf = logits[0, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.ensemble_cross_entropy(z, target[:2], label_smoothing=0.1), leaf)
    assert torch.autograd.gradgradcheck(lambda z: losses.ensemble_mse(z, logits[1, 0, :2]), leaf)


# --------------------------------------------------------------------------------------------------------- bad input

LOGITS, TARGET = torch.randn(2, 4, 3), torch.tensor([0, 1, 2, 1])
BAD = {
    "logits_list": ({"logits": [1.0]}, TypeError, "logits should be a torch.Tensor, got list [1.0]"),
    "logits_rank": ({"logits": LOGITS[0, 0]}, ValueError, "logits should be [E, *batch, C], neither E nor C of them 0"),
    "no_members": (
        {"logits": LOGITS[:0]},
        ValueError,
        "logits should be [E, *batch, C], neither E nor C of them 0, got",
    ),
    "target_list": ({"target": [0]}, TypeError, "target should be a torch.Tensor, got list [0]"),
    "target_bool": (
        {"target": TARGET.bool()},
        TypeError,
        "target should be a float32, float16, bfloat16 or float64 te",
    ),
    "target_rows": ({"target": TARGET[:3]}, ValueError, "target should be [4] or [2, 4], got int64[3] on cpu"),
    "target_members": ({"target": TARGET.expand(3, 4)}, ValueError, "target should be [4] or [2, 4], got int64[3, 4]"),
    "probabilities": ({"target": torch.ones(4, 2)}, ValueError, "target should be [4, 3] or [2, 4, 3], got float32[4,"),
    "target_device": ({"target": TARGET.to("meta")}, ValueError, "target should be on cpu like the predictions, got"),
    "target_large": (
        {"target": TARGET + 1},
        ValueError,
        "target should be classes from 0 to C - 1 = 2, or ignore_index=-100, got 3",
    ),
    "target_negative": ({"target": TARGET - 1}, ValueError, "or ignore_index=-100, got -1"),
    "row_weight": ({"row_weight": torch.ones(3)}, ValueError, "row_weight should be [4] or [2, 4], got float32[3]"),
    "row_weight_number": ({"row_weight": 1.0}, TypeError, "row_weight should be None or a torch.Tensor, got float 1.0"),
    "row_weight_negative": ({"row_weight": -torch.ones(4)}, ValueError, "row_weight should be at least 0, got -1.0"),
    "class_weight": (
        {"class_weight": torch.ones(4)},
        ValueError,
        "class_weight should be [C=3] on cpu, got float32[4]",
    ),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing should be from 0 to 1, got 1.5"),
    "smoothing_type": (
        {"label_smoothing": "a"},
        TypeError,
        "label_smoothing should be a number or a tensor [E], got ",
    ),
    "smoothing_size": (
        {"label_smoothing": torch.zeros(3)},
        ValueError,
        "label_smoothing should be a number or [E=2] on",
    ),
    "smoothing_values": (
        {"label_smoothing": torch.tensor([0.5, 2])},
        ValueError,
        "label_smoothing should be from 0 to 1",
    ),
    "reduction": (
        {"reduction": "average"},
        ValueError,
        "reduction should be one of 'mean', 'sum', 'members', 'none', got 'average'",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    changes, error, words = BAD[bad]
    arguments = {"logits": LOGITS, "target": TARGET, **changes}
    with pytest.raises(error) as raised:
        losses.ensemble_cross_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)
    assert str(raised.value).startswith("losses.ensemble_cross_entropy: ")
    assert words in str(raised.value)


def test_bad_input_of_regression_losses():
    means, target = torch.ones(2, 4), torch.ones(4)
    for arguments, words in (
        ((means[0], means, target), "means should be [E, B, *outputs] of at least one member, got float32[4] on cpu"),
        ((means, means, target[:3]), "target should be [4] or [2, 4], got float32[3] on cpu"),
        ((means, means[:1], target), "variances should be [2, 4] on cpu like means, got float32[1, 4] on cpu"),
        ((means, -means, target), "variances should be at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"losses.ensemble_gaussian_nll: {words}")):
            losses.ensemble_gaussian_nll(*arguments)
    with pytest.raises(ValueError, match=r"losses.ensemble_gaussian_nll: eps should be a number above 0, got 0"):
        losses.ensemble_gaussian_nll(means, means, target, eps=0)
    with pytest.raises(
        ValueError, match=r"losses.ensemble_mse: row_weight should be \[4\] or \[2, 4\], got float32\[2\]"
    ):
        losses.ensemble_mse(means, target, row_weight=torch.ones(2))


def test_bad_input_of_bootstrap_weights():
    with pytest.raises(TypeError, match=r"losses.bootstrap_weights: num_rows should be an int of at least 0, got 2.0"):
        losses.bootstrap_weights(2, 2.0)
    with pytest.raises(
        ValueError, match=r"losses.bootstrap_weights: num_members should be an int of at least 0, got -1"
    ):
        losses.bootstrap_weights(-1, 2)
    with pytest.raises(
        ValueError, match=r"losses.bootstrap_weights: method should be one of 'multinomial', 'poisson', '"
    ):
        losses.bootstrap_weights(1, 2, method="jackknife")
