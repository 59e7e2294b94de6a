"""Which members of an ensemble to run within a budget: greedy selection by how good their joint uncertainty is.

Of J candidates, the next is the one whose addition makes the best set (Oleksienko and Iosifidis 2022, "Layer
Ensembles", section III-B).  Mean and variance of all J sets are running moments of the set so far and one more member:
with n members so far, of mean m and sum of squared deviations M,

    m' = m + (y - m) / (n + 1)        M' = M + (y - m) (y - m')        variance M' / (n + 1)

so that a step costs one pass over the candidates' outputs, however many members there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._checks import check_tensor, reject

__all__ = ["PathRanking", "gaussian_kl", "rank_paths"]

Score = Callable[[Tensor, Tensor], Tensor]

_AT_ONCE = 2**22  # numbers of candidate sets that are scored in one call, unless one set has more


class PathRanking(NamedTuple):
    """Candidates from the best on.

    Attributes:
        order: `[P]`, indices of the candidates in the order of selection; the first n are the chosen set of n.
        scores: `[P]`, the score of the set of the first n + 1.

    Example:
        >>> import torch, effens_kernels as ek
        >>> outputs = torch.tensor([[0.0], [1.0], [3.0]])
        >>> ranking = ek.ensembles.rank_paths(outputs, lambda mean, variance: (mean - 1.5).abs().mean(-1))
        >>> ranking.order, ranking.best_size
        (tensor([1, 2, 0]), 3)
    """

    order: Tensor
    scores: Tensor

    @property
    def best_size(self) -> int:
        """How many members the best of the sets has."""
        return int(_nan_last(self.scores).argmin()) + 1


@torch.no_grad()
def rank_paths(outputs: Tensor, score: Score, num_paths: int | None = None) -> PathRanking:
    """Order members so that the first n of them make a good ensemble, for every n.

    The score is one of divergence or loss: the **smallest** is the best.  (The paper prints argmax over Q, but its Q is
    a KL divergence, which is smallest where uncertainty is best.)

    Args:
        outputs: `[J, ...]`, what each candidate predicts for validation data.
        score: takes `mean` and `variance` of c sets, both `[c, ...]`, and gives `[c]`.  The variance is that over a
            set's members (divided by their number), 0 for a single one: a score that divides by it or takes its
            logarithm has to add something, as the variance of the noise in the data.  :func:`gaussian_kl` is one.
        num_paths: P, how many to select; None for all.

    Returns:
        A :class:`PathRanking` of P candidates, each at most once.  Of equal scores the first candidate is taken, NaN
        counts as the worst.

    Moments are computed in float32 at least.  It takes J·P evaluations of the score of one set, many in a call.

    Raises:
        TypeError: outputs are no tensor, or of an unsupported dtype; num_paths is no int; the score gives no tensor.
        ValueError: no candidates; num_paths out of range; the score does not give `[c]`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> layers = [[torch.nn.Linear(8, 4) for _ in range(3)], [torch.nn.Linear(4, 1) for _ in range(3)]]
        >>> model = ek.nn.LayerEnsemble(layers)
        >>> x, y = torch.randn(50, 8), torch.randn(50, 1)
        >>> def nll(mean, variance):  # of targets with noise of variance 0.1
        ...     variance = variance + 0.1
        ...     return (0.5 * variance.log() + (y - mean).square() / (2 * variance)).flatten(1).mean(1)
        >>> paths = model.all_paths()
        >>> ranking = ek.ensembles.rank_paths(model(x, paths), nll, num_paths=5)
        >>> model.samples = paths[ranking.order]  # from now on, model(x) runs these
        >>> model(x).shape
        torch.Size([5, 50, 1])
    """
    op = "rank_paths"
    check_tensor(op, "outputs", outputs)
    if outputs.dim() < 1 or not outputs.numel():
        reject(op, "outputs", "[J, ...] of at least one candidate", outputs)
    candidates = len(outputs)
    num_paths = candidates if num_paths is None else num_paths
    if isinstance(num_paths, bool) or not isinstance(num_paths, int):
        reject(op, "num_paths", "None or an int", repr(num_paths), TypeError)
    if not 1 <= num_paths <= candidates:
        reject(op, "num_paths", f"1 to {candidates}", repr(num_paths))

    y = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    at_once = max(1, _AT_ONCE // y[0].numel())
    left = torch.arange(candidates, device=y.device)
    mean, squares = torch.zeros_like(y[0]), torch.zeros_like(y[0])
    order, scores = [], []
    for n in range(num_paths):
        found = torch.cat([_scores(score, y[some], mean, squares, n) for some in left.split(at_once)])
        best = _nan_last(found).argmin()
        chosen = left[best]
        mean, squares = _moments(y[chosen], mean, squares, n)
        order.append(chosen)
        scores.append(found[best])
        left = torch.cat([left[:best], left[best + 1 :]])
    return PathRanking(torch.stack(order), torch.stack(scores))


def gaussian_kl(mean: Tensor, variance: Tensor, true_mean: Tensor, true_variance: Tensor) -> Tensor:
    r"""Uncertainty quality of predictive distributions against the true one; smaller is better.

    .. math:: Q = \frac{1}{T} \sum_t \mathrm{KL}\bigl(\mathcal N(\mu_t, \sigma_t^2) \,\|\, \mathcal N(m_t, s_t^2)\bigr)
              = \frac{1}{2T} \sum_t \left( \frac{\sigma_t^2 + (\mu_t - m_t)^2}{s_t^2} - 1
              - \log \frac{\sigma_t^2}{s_t^2} \right)

    in nats (Layer Ensembles, equation 2; Osband et al. 2021, "Epistemic Neural Networks").  A variance of 0 gives inf.

    Args:
        mean, variance: `[c, ...]`, of c distributions.
        true_mean, true_variance: `[...]`, of the true one.

    Returns:
        `[c]`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ek.ensembles.gaussian_kl(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(3), torch.ones(3))
        tensor([0.5000])
    """
    ratio = variance / true_variance
    terms = ratio + (mean - true_mean).square() / true_variance - 1 - ratio.log()
    return 0.5 * terms.reshape(len(terms), -1).mean(1)


def _moments(y: Tensor, mean: Tensor, squares: Tensor, members: int) -> tuple[Tensor, Tensor]:
    after = mean + (y - mean) / (members + 1)
    return after, squares + (y - mean) * (y - after)


def _nan_last(scores: Tensor) -> Tensor:
    """As a minimum should see them: torch's argmin takes NaN for the smallest."""
    return scores.nan_to_num(nan=torch.inf)


def _scores(score: Score, y: Tensor, mean: Tensor, squares: Tensor, members: int) -> Tensor:
    after, squares = _moments(y, mean, squares, members)
    found = score(after, squares / (members + 1))
    if not isinstance(found, Tensor):
        reject("rank_paths", "the result of score", f"a tensor [c={len(y)}]", found, TypeError)
    if list(found.shape) != [len(y)]:
        reject("rank_paths", "the result of score", f"[c={len(y)}]", found)
    return found
