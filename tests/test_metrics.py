"""Metrics of ensembles: against loops in float64 and against torchmetrics, extremes, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import name_of
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from effens_kernels import metrics
from effens_kernels.testing import DTYPES

SIZES = [(1, 1, 1), (1, 40, 3), (2, 17, 2), (3, 1, 5), (4, 123, 10), (11, 61, 7)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "E{}-B{}-C{}".format(*size))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
WITH_LABELS = [name for name in metrics.__all__ if name != "log_mean_softmax"]


def data(size: tuple[int, int, int], dtype: torch.dtype = torch.float64, bins: tuple[int, ...] = (15,)) -> tuple:
    """Logits of members that agree in part, and labels that each of them knows in part.

    Drawn so that rounding does not decide what is predicted, or in which of `bins` a confidence falls.
    """
    members, rows, classes = size
    while True:
        labels = torch.randint(classes, (rows,))
        logits = torch.randn(rows, classes) + torch.randn(members, rows, classes)
        logits = (logits + 1.5 * torch.nn.functional.one_hot(labels, classes)).to(dtype)
        top = torch.from_numpy(np.sort(probabilities(logits)))
        gaps = [top[:, -1] - top[:, -2]] if classes > 1 else []
        gaps += [top[:, -1] - m / n for n in bins for m in range(1, n)]
        if all((gap.abs() > 1e-5).all() for gap in gaps):
            return logits, labels


# --------------------------------------------------------------------------- what each is by its definition, in loops


def probabilities(logits: Tensor) -> np.ndarray:
    """[B, C]."""
    z = logits.double().numpy()
    found = np.zeros(z.shape[1:])
    for member in z:
        for row, values in enumerate(member):
            powers = [math.exp(value - max(values)) for value in values]
            found[row] += np.array(powers) / sum(powers) / len(z)
    return found


def looped_nll(logits, labels):
    return np.mean([-math.log(p[y]) for p, y in zip(probabilities(logits), labels.tolist())])


def looped_ece(logits, labels, n_bins=15):
    p, total = probabilities(logits), 0.0
    for m in range(n_bins):
        rows = [b for b in range(len(p)) if m / n_bins < max(p[b]) <= (m + 1) / n_bins]
        if rows:
            right = np.mean([p[b].argmax() == labels[b].item() for b in rows])
            total += len(rows) / len(p) * abs(right - np.mean([max(p[b]) for b in rows]))
    return total


def looped_accuracy(logits, labels):
    return np.mean([p.argmax() == y for p, y in zip(probabilities(logits), labels.tolist())])


def looped_member_accuracies(logits, labels):
    z = logits.double().numpy()
    return [np.mean([row.argmax() == y for row, y in zip(member, labels.tolist())]) for member in z]


def looped_diversity(logits, labels):
    predicted = [[row.argmax() for row in member] for member in logits.double().numpy()]
    found = []
    for i in range(len(predicted)):
        for j in range(len(predicted)):
            if i != j:
                differing = np.mean([a != b for a, b in zip(predicted[i], predicted[j])])
                error = np.mean([b != y for b, y in zip(predicted[j], labels.tolist())])
                found.append(0.0 if differing == 0 else differing / error if error else math.inf)
    return np.mean(found)


@sizes
@dtypes
def test_log_probabilities(size, dtype):
    logits, _ = data(size, dtype)
    actual = metrics.log_mean_softmax(logits)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    expected = torch.from_numpy(np.log(probabilities(logits)))
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@sizes
@dtypes
@pytest.mark.parametrize("name", WITH_LABELS)
def test_equals_its_definition(name, size, dtype):
    if name == "diversity" and size[0] == 1:
        return  # refused, see below
    logits, labels = data(size, dtype)
    actual = getattr(metrics, name)(logits, labels)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor(globals()[f"looped_{name}"](logits, labels), dtype=torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@sizes
@pytest.mark.parametrize("n_bins", [1, 2, 10, 15, 100])
def test_ece_of_any_number_of_bins(size, n_bins):
    logits, labels = data(size, bins=(n_bins,))
    actual = metrics.ece(logits, labels, n_bins=n_bins)
    torch.testing.assert_close(actual.item(), looped_ece(logits, labels, n_bins), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_bins", [10, 15])
def test_equals_torchmetrics(n_bins):
    size = (5, 300, 10)
    logits, labels = data(size, torch.float32, (n_bins,))
    mean = logits.softmax(-1).mean(0)
    expected = multiclass_calibration_error(mean, labels, num_classes=10, n_bins=n_bins)
    torch.testing.assert_close(metrics.ece(logits, labels, n_bins), expected, rtol=1e-4, atol=1e-6)
    expected = multiclass_accuracy(mean, labels, num_classes=10, average="micro")
    torch.testing.assert_close(metrics.accuracy(logits, labels), expected)
    for member, actual in zip(logits, metrics.member_accuracies(logits, labels)):
        expected = multiclass_accuracy(member, labels, num_classes=10, average="micro")
        torch.testing.assert_close(actual, expected)
    expected = torch.nn.functional.nll_loss(mean.log(), labels)
    torch.testing.assert_close(metrics.nll(logits, labels), expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- extremes


def test_probabilities_that_underflow():
    """exp(-2000) is 0 in any dtype; its logarithm is not."""
    logits = torch.tensor([[[0.0, 2000.0]], [[0.0, 3000.0]]])
    assert metrics.nll(logits, torch.tensor([0])).item() == pytest.approx(2000 + math.log(2), rel=1e-6)
    logits = torch.tensor([[[60000.0, -60000.0]], [[-60000.0, 60000.0]]], dtype=torch.float16)  # the dtype's range
    torch.testing.assert_close(metrics.log_mean_softmax(logits).exp(), torch.full((1, 2), 0.5))
    masked = torch.tensor([[[0.0, -math.inf, 0.0]]])  # a class that cannot be
    assert metrics.nll(masked, torch.tensor([2])).item() == pytest.approx(math.log(2))
    assert metrics.nll(masked, torch.tensor([1])).item() == math.inf


def test_certain_predictions_are_in_the_last_bin():
    """Of 4 rows, all with a confidence of 1, one is wrong."""
    logits = torch.tensor([[[100.0, 0.0]] * 4])
    assert metrics.ece(logits, torch.tensor([0, 0, 0, 1])).item() == 0.25
    assert metrics.ece(logits, torch.tensor([0, 0, 0, 0])).item() == 0
    assert metrics.ece(logits, torch.tensor([1, 1, 1, 1])).item() == 1


def test_edges_belong_to_the_bin_below():
    """As in Guo et al.: a confidence of 1/2 is in (0, 1/2], where it does not meet 3/4."""
    logits = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]], dtype=torch.float64).log()
    labels = torch.tensor([logits[0, 0].argmax().item(), 1])
    assert metrics.ece(logits, labels, n_bins=2).item() == pytest.approx((0.5 + 0.75) / 2)
    assert metrics.ece(logits, labels, n_bins=1).item() == pytest.approx(abs(0.5 - 0.75) / 2)


def logits_of(*predicted: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), 3).double()


def test_diversity_where_a_member_has_no_errors():
    labels = torch.tensor([0, 1, 2, 0])
    right, wrong, other = [0, 1, 2, 0], [0, 1, 2, 1], [0, 1, 0, 0]
    assert metrics.diversity(logits_of(right, right), labels) == 0  # none differ
    assert metrics.diversity(logits_of(right, wrong), labels) == math.inf
    assert metrics.diversity(logits_of(wrong, other), labels) == 2  # each wrong once, differing twice
    assert metrics.diversity(logits_of(wrong, wrong), labels) == 0
    assert metrics.diversity(logits_of(wrong, other, wrong), labels).item() == pytest.approx(4 / 3)


def test_diversity_of_independent_guesses():
    """Of C classes, they differ as often as they are wrong."""
    logits, labels = torch.randn(4, 20000, 10), torch.randint(10, (20000,))
    assert metrics.diversity(logits, labels).item() == pytest.approx(1, abs=0.02)


def test_diversity_does_not_depend_on_the_order_of_members():
    logits, labels = data((5, 200, 4))
    torch.testing.assert_close(metrics.diversity(logits, labels), metrics.diversity(logits.flip(0), labels))


@pytest.mark.parametrize("name", WITH_LABELS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=name_of)
def test_integers_of_any_kind(name, dtype):
    logits, labels = data((3, 50, 4))
    assert torch.equal(getattr(metrics, name)(logits, labels.to(dtype)), getattr(metrics, name)(logits, labels))


def test_arguments_stay_as_they_are():
    logits, labels = data((3, 50, 4), torch.float32)
    before = logits.clone(), labels.clone()
    for name in WITH_LABELS:
        getattr(metrics, name)(logits, labels)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def test_strided_logits():
    """[B, E, C] turned round, as layers with batch_first=True give it."""
    logits, labels = data((3, 50, 4))
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    for name in WITH_LABELS:
        torch.testing.assert_close(getattr(metrics, name)(turned, labels), getattr(metrics, name)(logits, labels))


# ---------------------------------------------------------------------------------------------- PyTorch's machinery


def test_nll_is_a_loss():
    logits, labels = data((3, 6, 4))
    assert torch.autograd.gradcheck(lambda z: metrics.nll(z, labels), logits.requires_grad_())
    assert torch.autograd.gradcheck(metrics.log_mean_softmax, logits)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_compiled_is_one_graph(name):
    torch._dynamo.reset()
    logits, labels = data((3, 40, 4))
    compiled = torch.compile(getattr(metrics, name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels), getattr(metrics, name)(logits, labels))


@pytest.mark.parametrize("name", WITH_LABELS)
def test_vmap_and_meta(name):
    logits, labels = data((3, 40, 4))
    call = getattr(metrics, name)
    several = torch.stack([logits, logits.flip(1)])
    y = torch.func.vmap(call, in_dims=(0, None))(several, labels)
    torch.testing.assert_close(y[1], call(logits.flip(1), labels))
    assert call(logits.to("meta"), labels.to("meta")).shape == call(logits, labels).shape


# --------------------------------------------------------------------------------------------------------- bad input


BAD = {
    "logits_list": ({"logits": [1.0]}, TypeError, "logits should be a torch.Tensor, got list"),
    "logits_int": ({"logits": torch.ones(2, 4, 3).long()}, TypeError, "logits should be a float32, float16, bfloat16"),
    "logits_rank": ({"logits": torch.ones(4, 3)}, ValueError, "logits should be [E, B, C], none of them 0, got float3"),
    "no_members": ({"logits": torch.ones(0, 4, 3)}, ValueError, "logits should be [E, B, C], none of them 0, got floa"),
    "no_rows": ({"logits": torch.ones(2, 0, 3)}, ValueError, "logits should be [E, B, C], none of them 0, got float32"),
    "no_classes": ({"logits": torch.ones(2, 4, 0)}, ValueError, "logits should be [E, B, C], none of them 0, got floa"),
    "labels_list": ({"labels": [0, 1, 2, 1]}, TypeError, "labels should be a torch.Tensor, got list [0, 1, 2, 1]"),
    "labels_float": ({"labels": torch.ones(4)}, TypeError, "labels should be a tensor of integers, got float32[4]"),
    "labels_bool": ({"labels": torch.ones(4).bool()}, TypeError, "labels should be a tensor of integers, got bool[4]"),
    "labels_rows": (
        {"labels": torch.ones(5).long()},
        ValueError,
        "labels should be [B=4] to fit logits [2, 4, 3], got int64[5] on cpu",
    ),
    "labels_rank": ({"labels": torch.ones(2, 4).long()}, ValueError, "labels should be [B=4] to fit logits [2, 4, 3]"),
    "labels_device": ({"labels": torch.ones(4, device="meta").long()}, ValueError, "labels should be on cpu like logi"),
    "labels_large": (
        {"labels": torch.tensor([1, 2, 3, 2])},
        ValueError,
        "labels should be classes from 0 to C - 1 = 2, got labels from 1 to 3",
    ),
    "labels_negative": (
        {"labels": torch.tensor([1, -100, 0, 2])},
        ValueError,
        "labels should be classes from 0 to C - 1 = 2, got labels from -100 to 2",
    ),
}


@pytest.mark.parametrize("name", WITH_LABELS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_input(name, bad):
    changes, error, words = BAD[bad]
    with pytest.raises(error) as raised:
        getattr(metrics, name)(**{"logits": torch.randn(2, 4, 3), "labels": torch.tensor([0, 1, 2, 1]), **changes})
    assert str(raised.value).startswith(f"metrics.{name}: ")
    assert words in str(raised.value)


def test_bad_input_of_single_functions():
    logits, labels = data((1, 4, 3))
    with pytest.raises(
        ValueError, match=r"metrics.log_mean_softmax: logits should be \[E, B, C\], none of them 0, got"
    ):
        metrics.log_mean_softmax(logits[0])
    with pytest.raises(
        ValueError, match=r"metrics.diversity: logits should be \[E, B, C\] of at least 2 members, got "
    ):
        metrics.diversity(logits, labels)
    for n_bins, error in ((0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"metrics.ece: n_bins should be an int of at least 1, got {n_bins}"):
            metrics.ece(logits, labels, n_bins=n_bins)


def test_nll_has_a_gradient_where_a_class_is_not_allowed():
    """As torch.nn.functional.cross_entropy has one."""
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    logits[:, :, 2] = -torch.inf
    logits.requires_grad_()
    labels = torch.tensor([0, 1, 3, 4])
    (gradient,) = torch.autograd.grad(metrics.nll(logits, labels), logits)
    assert gradient.isfinite().all()
    allowed = logits.detach()[..., [0, 1, 3, 4]].requires_grad_()
    (expected,) = torch.autograd.grad(metrics.nll(allowed, torch.arange(4)), allowed)
    torch.testing.assert_close(gradient[..., [0, 1, 3, 4]], expected)
