"""ensemble_predict: what an ensemble of classifiers says of each row, and how sure of it its members are."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

from ... import _dispatch
from .._checks import check_tensor, reject
from . import autograd, batching, reference  # noqa: F401  (batching registers the vmap rules)

__all__ = ["Prediction", "ensemble_predict"]


class Prediction(NamedTuple):
    r"""What :func:`ensemble_predict` returns; `*batch` are the rows' axes.

    `mean_probs` `[*batch, C]`, the ensemble's prediction; `variance` `[*batch, C]` of the members' probabilities; and,
    `[*batch]`, in nats: `entropy` of the prediction (total uncertainty), `expected_entropy` of the members (aleatoric),
    `mutual_information`, their difference (epistemic); `disagreement`, the share of pairs of members that predict
    different classes.

    Example:
        >>> import torch, effens_kernels as ek
        >>> found = ek.ensemble_predict(torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]]))  # both undecided between 2 classes
        >>> found.mean_probs, found.entropy, found.mutual_information
        (tensor([[0.5000, 0.5000]]), tensor([0.6931]), tensor([0.]))
    """

    mean_probs: Tensor
    variance: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor


def ensemble_predict(logits: Tensor, *, backend: str | None = None) -> Prediction:
    r"""Mean probabilities of an ensemble of classifiers, and its uncertainty, in one pass over the members' logits.

    .. math::
        \begin{aligned}
        p_e &= \mathrm{softmax}(z_e) & \bar p &= \tfrac{1}{E} \sum_e p_e &
        \sigma^2_c &= \tfrac{1}{E} \sum_e (p_{ec} - \bar p_c)^2 \\
        \mathcal{H}(p) &= -\sum_c p_c \log p_c & \mathcal{I} &= \mathcal{H}(\bar p) - \tfrac{1}{E} \sum_e
        \mathcal{H}(p_e) & d &= \tfrac{1}{E (E - 1)} \bigl|\{(i, j): \arg\max p_i \ne \arg\max p_j\}\bigr|
        \end{aligned}

    :math:`\mathcal{H}(\bar p)` is the total uncertainty, the mean of the members' entropies the part that more data
    would not remove (aleatoric), and the mutual information :math:`\mathcal{I}` between prediction and member the part
    that it would (epistemic): Depeweg et al. 2018, "Decomposition of Uncertainty in Bayesian Deep Learning", section 3;
    BALD (Houlsby et al. 2011, equation 2).  The mean of probabilities, not of logits, as in deep ensembles
    (Lakshminarayanan et al. 2017, section 2.4).

    :math:`\mathcal{I}` is computed as the mean of :math:`\mathrm{KL}(p_e \| \bar p)`, in terms that are not negative:
    it never is, and is accurate where members nearly agree and the difference of two entropies would be rounding.

    Args:
        logits: `[E, *batch, C]`, most often `[E, B, C]`; any strides, so that `[B, E, C]` transposed costs no copy.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        :class:`Prediction`: mean_probs and variance `[*batch, C]`; entropy, expected_entropy, mutual_information and
        disagreement `[*batch]`.  float32, or float64 for float64 logits.

    A logit of -inf is a class of probability 0, which adds nothing anywhere and has a gradient of 0.  A row with a NaN,
    with +inf, or of a member without any possible class, is NaN in all results, and no other row is.  Of equal logits,
    the first class counts as predicted.  An empty batch gives empty results.  Differentiable any number of times
    through all results but the disagreement; logits and mean_probs are what is kept for backward.

    Raises:
        TypeError: logits are no tensor, or of an unsupported dtype.
        ValueError: logits are not `[E, *batch, C]`, or without members or classes; unknown backend; a backend that
            cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits = torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]])  # 2 members, 2 rows
        >>> found = ek.ensemble_predict(logits)
        >>> found.mutual_information                            # agreed on the first row, not on the second
        tensor([0.0000, 0.6919])
        >>> found.disagreement
        tensor([0., 1.])
    """
    op = "ensemble_predict"
    check_tensor(op, "logits", logits)
    if logits.dim() < 2:
        reject(op, "logits", "[E, *batch, C]", logits)
    members, *batch, classes = logits.shape
    if members == 0:
        reject(op, "logits", "[E, *batch, C] of at least one member", logits)
    if classes == 0:
        reject(op, "logits", "[E, *batch, C] of at least one class", logits)
    chosen = _dispatch.select(_dispatch.Problem(op, logits.device.type, logits.dtype), backend)
    rows = logits if len(batch) == 1 else logits.reshape(members, prod(batch), classes)
    found = reference.fwd(rows) if chosen == "reference" else autograd.apply(rows, chosen)
    if len(batch) == 1:
        return Prediction(*found)
    return Prediction(*(t.view([*batch, *t.shape[1:]]) for t in found))
