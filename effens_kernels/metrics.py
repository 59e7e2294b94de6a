"""What an ensemble of classifiers is judged by, from the logits of its members [E, B, C] and the labels [B].

The prediction of an ensemble is the mean of its members' probabilities.  Every function is made of PyTorch's
operations, on any device; results are tensors on the device of the logits, computed in float32 at least, and
deterministic.  Labels out of range are refused where their values can be read: not under `torch.compile`, `torch.func`
and the like.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from .ops._checks import check_tensor, reject
from .ops._registration import is_plain_eager

__all__ = ["accuracy", "diversity", "ece", "log_mean_softmax", "member_accuracies", "nll"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def log_mean_softmax(logits: Tensor) -> Tensor:
    r"""Log-probabilities of the ensemble: of the mean of its members' softmax.

    .. math:: \log p_{bc} = \log \frac{1}{E} \sum_{e=1}^{E} \mathrm{softmax}(z_{eb})_c

    in nats, by log-softmax and a log-sum-exp over the members, so that no probability underflows; differentiable.  The
    prediction that is used by deep ensembles (Lakshminarayanan et al. 2017) and MixtureEnsembles (Teterwak et al.
    2021), not the softmax of the mean logits.

    Args:
        logits: `[E, B, C]`, float32, float16, bfloat16 or float64.

    Returns:
        `[B, C]`, float32 or float64.

    Raises:
        TypeError: logits are no tensor, or of an unsupported dtype.
        ValueError: logits are not `[E, B, C]`, or an axis is empty.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits = torch.tensor([[[2.0, 0.0]], [[-1000.0, 1000.0]]])  # 2 members, 1 row, 2 classes
        >>> ek.metrics.log_mean_softmax(logits).exp()
        tensor([[0.4404, 0.5596]])
    """
    _check_logits("log_mean_softmax", logits)
    return _log_probabilities(logits)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Negative log-likelihood of the labels under the ensemble's prediction, mean over the rows, in nats.

    .. math:: \mathrm{NLL} = -\frac{1}{B} \sum_b \log p_{b y_b}

    with :math:`p` of :func:`log_mean_softmax`; differentiable.  The members' own losses are another thing: their mean
    is `torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(E))`, and never smaller.

    Args:
        logits: `[E, B, C]`, of the members.
        labels: `[B]`, integers from 0 to C - 1.

    Returns:
        A number, as a tensor of float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit, an axis is empty, or a label is out of range.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits, labels = torch.zeros(3, 8, 10), torch.arange(8)  # equal odds of 10 classes
        >>> ek.metrics.nll(logits, labels)
        tensor(2.3026)
    """
    labels = _check("nll", logits, labels)
    # Of the labels' classes alone: one that no member allows has no derivative.
    own = logits.to(_wide(logits)).log_softmax(-1).gather(-1, labels.expand(len(logits), -1).unsqueeze(-1))
    return log(len(logits)) - own.logsumexp(0).mean()


def ece(logits: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    r"""Expected calibration error of the ensemble's prediction, over bins of equal width.

    .. math:: \mathrm{ECE} = \sum_{m=1}^{M} \frac{|B_m|}{B} \, \bigl|\mathrm{acc}(B_m) - \mathrm{conf}(B_m)\bigr|

    where a row's confidence is the probability of the class that is predicted, and :math:`B_m` are the rows whose
    confidence is in :math:`((m - 1) / M, m / M]` (Guo et al. 2017, "On Calibration of Modern Neural Networks",
    equation 3).

    Args:
        logits: `[E, B, C]`, of the members.
        labels: `[B]`, integers from 0 to C - 1.
        n_bins: M; 15 as in the paper.

    Returns:
        A number from 0 to 1, as a tensor of float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype; n_bins is no int.
        ValueError: shapes or devices do not fit, an axis is empty, or a label is out of range; n_bins below 1.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits = torch.tensor([[[0.8, 0.2]] * 5]).log()     # sure by 80 % in each of 5 rows
        >>> ek.metrics.ece(logits, torch.tensor([0, 0, 0, 1, 1]))  # and right in 60 %
        tensor(0.2000)
    """
    labels = _check("ece", logits, labels)
    if not isinstance(n_bins, int) or isinstance(n_bins, bool):
        reject("metrics.ece", "n_bins", "an int of at least 1", repr(n_bins), TypeError)
    if n_bins < 1:
        reject("metrics.ece", "n_bins", "an int of at least 1", repr(n_bins))
    top, predicted = _log_probabilities(logits).max(-1)
    confidence = top.exp()
    inner = torch.arange(1, n_bins, device=logits.device, dtype=confidence.dtype) / n_bins
    index = torch.bucketize(confidence.detach(), inner)
    excess = (predicted == labels).to(confidence.dtype) - confidence
    # Not scattered into the bins: atomic additions on a GPU have no fixed order.
    bins = torch.arange(n_bins, device=logits.device).unsqueeze(1)
    return torch.where(index == bins, excess, 0).sum(1).abs().sum() / len(labels)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Fraction of rows whose class is the likeliest of the ensemble's prediction, :func:`log_mean_softmax`.

    .. math:: \frac{1}{B} \, \bigl|\{ b : \arg\max_c p_{bc} = y_b \}\bigr|

    Args:
        logits: `[E, B, C]`, of the members.
        labels: `[B]`, integers from 0 to C - 1.

    Returns:
        A number from 0 to 1, as a tensor of float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit, an axis is empty, or a label is out of range.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 3.0]]])  # 2 members, 2 rows
        >>> ek.metrics.accuracy(logits, torch.tensor([0, 1]))
        tensor(1.)
    """
    labels = _check("accuracy", logits, labels)
    return _mean(_log_probabilities(logits).argmax(-1) == labels, logits)


def member_accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Each member's own accuracy: the fraction of rows whose class has its largest logit.

    .. math:: a_e = \frac{1}{B} \, \bigl|\{ b : \arg\max_c z_{ebc} = y_b \}\bigr|

    Args:
        logits: `[E, B, C]`, of the members.
        labels: `[B]`, integers from 0 to C - 1.

    Returns:
        `[E]`, float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit, an axis is empty, or a label is out of range.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 3.0]]])  # 2 members, 2 rows
        >>> ek.metrics.member_accuracies(logits, torch.tensor([0, 1]))
        tensor([1.0000, 0.5000])
    """
    labels = _check("member_accuracies", logits, labels)
    return _mean(logits.argmax(-1) == labels, logits)


def diversity(logits: Tensor, labels: Tensor) -> Tensor:
    r"""How often two members disagree, in units of how often one of them is wrong; mean over the pairs of members.

    .. math:: \frac{1}{E (E - 1)} \sum_{i \ne j} \frac{d_{ij}}{1 - a_j}, \qquad
              d_{ij} = \frac{1}{B} \, \bigl|\{ b : \hat y_{ib} \ne \hat y_{jb} \}\bigr|

    with the members' predicted classes :math:`\hat y` and accuracies :math:`a` (Fort et al. 2019, "Deep Ensembles: A
    Loss Landscape Perspective", section 5; table 6 of MixtureEnsembles).  0: all members predict the same.  The papers
    divide by the error of "one" of two members; here each of the two is that one in turn, so that the order of members
    does not matter.

    A member without errors leaves that unit undefined.  A pair that never disagrees counts as 0 even then; if another
    member disagrees with the one without errors, the result is inf, rather than a mean over other pairs.

    Args:
        logits: `[E, B, C]`, of 2 members or more.
        labels: `[B]`, integers from 0 to C - 1.

    Returns:
        A number of at least 0, as a tensor of float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: fewer than 2 members; shapes or devices do not fit, an axis is empty, or a label is out of range.

    Example:
        >>> import torch, effens_kernels as ek
        >>> predicted = torch.tensor([[0, 1, 2, 1], [0, 1, 1, 2]])  # of 2 members: each wrong once, different twice
        >>> ek.metrics.diversity(torch.nn.functional.one_hot(predicted).float(), torch.tensor([0, 1, 2, 2]))
        tensor(2.)
    """
    labels = _check("diversity", logits, labels)
    members = len(logits)
    if members < 2:
        reject("metrics.diversity", "logits", "[E, B, C] of at least 2 members", logits)
    predicted = logits.argmax(-1)
    differing = torch.stack([_mean(predicted != own, logits) for own in predicted])
    errors = _mean(predicted != labels, logits)
    return torch.where(differing == 0, 0, differing / errors).sum() / (members * (members - 1))


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(_wide(logits)).log_softmax(-1).logsumexp(0) - log(len(logits))


def _mean(true: Tensor, logits: Tensor) -> Tensor:
    """The fraction that is true, over the last axis."""
    return true.to(_wide(logits)).mean(-1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_logits(function: str, logits: Tensor) -> None:
    check_tensor(f"metrics.{function}", "logits", logits)
    if logits.dim() != 3 or 0 in logits.shape:
        reject(f"metrics.{function}", "logits", "[E, B, C], none of them 0", logits)


def _check(function: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The labels as int64."""
    _check_logits(function, logits)
    name = f"metrics.{function}"
    if not isinstance(labels, Tensor):
        reject(name, "labels", "a torch.Tensor", labels, TypeError)
    if labels.dtype not in _INTEGERS:
        reject(name, "labels", "a tensor of integers", labels, TypeError)
    rows, classes = logits.shape[1:]
    if list(labels.shape) != [rows]:
        reject(name, "labels", f"[B={rows}] to fit logits {list(logits.shape)}", labels)
    if labels.device != logits.device:
        reject(name, "labels", f"on {logits.device} like logits", labels)
    if is_plain_eager(logits, labels):
        least, most = (int(label) for label in labels.aminmax())
        if least < 0 or most >= classes:
            reject(name, "labels", f"classes from 0 to C - 1 = {classes - 1}", f"labels from {least} to {most}")
    return labels.long()
