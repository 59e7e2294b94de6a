"""rank_paths equals a greedy search that recomputes every set from its members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effens_kernels.ensembles import gaussian_kl, rank_paths, ranking


def brute_force(outputs: Tensor, score, num_paths: int) -> tuple[list[int], list[float]]:
    """Every set of every step on its own."""
    chosen: list[int] = []
    scores: list[float] = []
    for _ in range(num_paths):
        best = None
        for j in range(len(outputs)):
            if j in chosen:
                continue
            members = outputs[[*chosen, j]].double()
            value = score(members.mean(0, keepdim=True), members.var(0, unbiased=False).unsqueeze(0)).item()
            if best is None or value < best[0]:
                best = value, j
        scores.append(best[0])
        chosen.append(best[1])
    return chosen, scores


def kl_score(rows: tuple[int, ...]):
    mean, variance = torch.randn(rows, dtype=torch.float64), torch.rand(rows, dtype=torch.float64) + 0.1
    return lambda m, v: gaussian_kl(m, v + 0.01, mean, variance)


@pytest.mark.parametrize("rows", [(20,), (7, 3), (1,)])
@pytest.mark.parametrize("num_paths", [1, 5, 12])
@pytest.mark.parametrize("at_once", [1, 50, 2**22])
def test_brute_force(rows, num_paths, at_once, monkeypatch):
    monkeypatch.setattr(ranking, "_AT_ONCE", at_once)
    outputs, score = torch.randn(12, *rows, dtype=torch.float64), kl_score(rows)
    found = rank_paths(outputs, score, num_paths)
    order, scores = brute_force(outputs, score, num_paths)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_any_score():
    """One that reads means alone, of members far from 0 with little between them: no cancellation."""
    outputs = 1e6 + torch.randn(9, 4, dtype=torch.float64)
    found = rank_paths(outputs, lambda mean, variance: -variance.mean(1))
    order, scores = brute_force(outputs, lambda mean, variance: -variance.mean(1), 9)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float64), rtol=1e-8, atol=0)


def test_smallest_is_best():
    """The paper prints argmax; of a divergence that would choose the worst."""
    truth = torch.zeros(5), torch.ones(5)
    outputs = torch.stack([torch.full((5,), 3.0), torch.full((5,), 0.1), torch.full((5,), -1.0)])
    found = rank_paths(outputs, lambda m, v: gaussian_kl(m, v + 0.5, *truth))
    assert found.order[0] == 1
    assert found.order.tolist() != sorted(found.order.tolist())
    assert found.best_size == int(found.scores.argmin()) + 1


def test_ties_and_nan():
    outputs = torch.tensor([[1.0], [1.0], [1.0]])
    assert rank_paths(outputs, lambda m, v: m.flatten()).order.tolist() == [0, 1, 2]
    assert rank_paths(torch.tensor([[torch.nan], [2.0], [1.0]]), lambda m, v: m.flatten()).order.tolist()[:2] == [2, 1]
    ranking = rank_paths(torch.tensor([[0.0], [1.0], [3.0]]), lambda m, v: (v - 1 + 0 / v).flatten())
    assert ranking.scores[0].isnan()  # of every single one
    assert ranking.best_size == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_sums_in_float32(dtype):
    outputs = torch.randn(10, 30).to(dtype)
    seen = []
    found = rank_paths(outputs, lambda m, v: (seen.append((m.dtype, v.dtype)), m.square().mean(1))[1])
    assert set(seen) == {(torch.float32, torch.float32)}
    assert sorted(found.order.tolist()) == list(range(10))


def test_inference_budget():
    """The paper's size: 36 of 125 paths.  A set's score is asked for once per candidate and step, not per member."""
    outputs, calls = torch.randn(125, 1000), []

    def score(mean: Tensor, variance: Tensor) -> Tensor:
        calls.append(len(mean))
        return (mean.square() + variance).mean(1)

    assert len(rank_paths(outputs, score, 36).order) == 36
    assert sum(calls) == sum(125 - n for n in range(36))
    assert len(calls) == 36


def test_gaussian_kl():
    mean, variance = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64) + 0.1
    true_mean, true_variance = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    p = torch.distributions.Normal(mean, variance.sqrt())
    q = torch.distributions.Normal(true_mean, true_variance.sqrt())
    expected = torch.distributions.kl_divergence(p, q).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, variance, true_mean, true_variance), expected)
    assert gaussian_kl(mean, torch.zeros(4, 6), true_mean, true_variance).isinf().all()
    of_one_number = gaussian_kl(mean[:, 0], variance[:, 0], true_mean[0], true_variance[0])
    torch.testing.assert_close(
        of_one_number, gaussian_kl(*(t[..., :1] for t in (mean, variance, true_mean, true_variance)))
    )


SCORE = lambda m, v: m.flatten(1).mean(1)  # noqa: E731
BAD = {
    "no_tensor": (lambda: rank_paths([1.0], SCORE), TypeError, "rank_paths: outputs should be a torch.Tensor"),
    "integers": (lambda: rank_paths(torch.ones(3, 2).long(), SCORE), TypeError, "outputs should be a float32"),
    "no_candidates": (lambda: rank_paths(torch.ones(0, 2), SCORE), ValueError, "at least one candidate"),
    "scalar": (lambda: rank_paths(torch.tensor(1.0), SCORE), ValueError, "outputs should be [J, ...]"),
    "too_many": (lambda: rank_paths(torch.ones(3, 2), SCORE, 4), ValueError, "num_paths should be 1 to 3, got 4"),
    "none": (lambda: rank_paths(torch.ones(3, 2), SCORE, 0), ValueError, "num_paths should be 1 to 3, got 0"),
    "float": (lambda: rank_paths(torch.ones(3, 2), SCORE, 2.0), TypeError, "num_paths should be None or an int"),
    "bool": (lambda: rank_paths(torch.ones(3, 2), SCORE, True), TypeError, "num_paths should be None or an int"),
    "score_shape": (lambda: rank_paths(torch.ones(3, 2), lambda m, v: m), ValueError, "score should be [c=3]"),
    "score_type": (lambda: rank_paths(torch.ones(3, 2), lambda m, v: 1.0), TypeError, "score should be a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, words = BAD[name]
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)
