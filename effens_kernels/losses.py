"""Losses that train the members of an ensemble at once, each as if it were alone, and weights for the bootstrap.

Every loss here is the mean over the members of each member's own loss.  The loss of the averaged prediction is another
thing: there, the gradient of a member depends on what the others predict.  Members then make up for each other's errors
on the training data, and are not good on their own (Jeffares et al. 2023, "Joint Training of Deep Ensembles Fails Due
to Learner Collusion"); deep ensembles train each alone (Lakshminarayanan et al. 2017, section 2.4).  To measure the
loss of the prediction, and not to train by it, see `effens_kernels.metrics.nll`.

All are made of PyTorch's operations, on any device; results are float32 at least.
"""

from __future__ import annotations

from math import log, pi, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops._checks import check_tensor, has_values, reject

__all__ = ["bootstrap_weights", "ensemble_cross_entropy", "ensemble_gaussian_nll", "ensemble_mse"]

REDUCTIONS = ("mean", "sum", "members", "none")
METHODS = ("multinomial", "poisson", "double_or_nothing")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def ensemble_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Mean over the members of each one's cross-entropy; never that of their mean prediction.

    .. math::
        L = \frac{1}{E} \sum_e L_e \qquad
        L_e = \frac{\sum_b r_{eb} \, \ell_{eb}}{\sum_b r_{eb} \, w_{y_{eb}}} \qquad
        \ell_{eb} = -w_{y_{eb}} \log \mathrm{softmax}(z_{eb})_{y_{eb}}

    with class weights w and row weights r of 1 if they are not given.  The gradient of :math:`L_e` is what member e
    would have alone.  The loss of the mean prediction is not offered: it couples the members, which are then not
    trained to be good on their own (see the module's text).  By Jensen's inequality it is never larger.

    Args:
        logits: `[E, *batch, C]`, most often `[E, B, C]`, float32, float16, bfloat16 or float64.
        target: classes, integers `[*batch]` for all members or `[E, *batch]`; or probabilities, of a floating dtype,
            `[*batch, C]` or `[E, *batch, C]`.
        row_weight: `[*batch]` or `[E, *batch]`, at least 0: how often a row counts, as `bootstrap_weights` gives it.  A
            member's loss is the weighted mean; of a member whose rows all have weight 0 it is 0.
        class_weight: `[C]`, as `weight` of `torch.nn.functional.cross_entropy`.
        label_smoothing: from 0 to 1, as of `torch.nn.functional.cross_entropy`, or a tensor `[E]`, one per member.
        ignore_index: rows of this class count for nothing; of targets that are classes.
        reduction: "mean"; "sum" of the members' losses, so that each member's gradient is what it would be alone;
            "members", the loss of each, `[E]`; "none", of each row, weighted, `[E, *batch]`.

    Returns:
        A number, `[E]` or `[E, *batch]`, float32 or float64.  Equal to `torch.nn.functional.cross_entropy` member after
        member; row weights are as if rows were repeated.  As there, a member without rows that count has loss NaN
        (without row weights), and with probabilities the mean is over all rows, whatever their class weights.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit; a class out of range, where it can be seen; label_smoothing or
            reduction that there is not.

    Example:
        >>> import torch, effens_kernels as ek
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])  # 2 members, 2 rows
        >>> ek.losses.ensemble_cross_entropy(logits, torch.tensor([0, 1]), reduction="members")
        tensor([0.4100, 1.4100])
        >>> ek.losses.ensemble_cross_entropy(logits, torch.tensor([0, 1]))
        tensor(0.9100)
    """
    op = "losses.ensemble_cross_entropy"
    check_tensor(op, "logits", logits)
    if logits.dim() < 2 or logits.shape[0] == 0 or logits.shape[-1] == 0:
        reject(op, "logits", "[E, *batch, C], neither E nor C of them 0", logits)
    members, *batch, classes = logits.shape
    _check_reduction(op, reduction)
    has_classes = isinstance(target, Tensor) and target.dtype in _INTEGERS
    if not has_classes:
        check_tensor(op, "target", target)
    target = _of_members(op, "target", target, logits, batch if has_classes else [*batch, classes])
    row_weight = _row_weight(op, row_weight, logits, batch)
    smoothing = _smoothing(op, label_smoothing, logits)
    if class_weight is not None:
        check_tensor(op, "class_weight", class_weight)
        if class_weight.shape != (classes,) or class_weight.device != logits.device:
            reject(op, "class_weight", f"[C={classes}] on {logits.device}", class_weight)
        class_weight = class_weight.to(_wide(logits))
    if has_classes:
        target = target.long()
        _check_classes(op, target, classes, ignore_index)
    else:
        target = target.to(_wide(logits))

    rows = logits.to(_wide(logits)).reshape(members * prod(batch), classes)
    flat = target.reshape(rows.shape[: 1 if has_classes else 2])

    def of_rows(smoothed: float) -> Tensor:
        options = {"weight": class_weight, "ignore_index": ignore_index} if has_classes else {"weight": class_weight}
        found = F.cross_entropy(rows, flat, reduction="none", label_smoothing=smoothed, **options)
        return found.view(members, *batch)

    if isinstance(smoothing, Tensor):  # the loss is linear in it
        smoothing = smoothing.view(members, *(1 for _ in batch))
        plain = of_rows(0.0)
        mixed = (1 - smoothing) * plain + smoothing * of_rows(1.0)
        found = torch.where(smoothing == 0, plain, mixed)  # of the other, inf may be a part
    else:
        found = of_rows(smoothing)
    counts = None
    if has_classes and reduction != "none":
        counted = target != ignore_index
        counts = counted.to(found.dtype)
        if class_weight is not None:
            counts = counts * class_weight[target.masked_fill(~counted, 0)]
    return _reduce(found, row_weight, reduction, counts)


def ensemble_gaussian_nll(
    means: Tensor,
    variances: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Mean over the members of each one's negative log-likelihood under its own normal distribution.

    .. math::
        L = \frac{1}{E} \sum_e \frac{\sum_b r_{eb} \, \ell_{eb}}{\sum_b r_{eb}} \qquad
        \ell_{eb} = \frac{1}{2} \Bigl(\log \sigma_{eb}^2 + \frac{(y_{eb} - \mu_{eb})^2}{\sigma_{eb}^2}\Bigr)
        \;\bigl[{} + \tfrac{1}{2} \log 2 \pi\bigr]

    the loss of deep ensembles (Lakshminarayanan et al. 2017, equation 1), as `torch.nn.functional.gaussian_nll_loss`.

    Args:
        means: `[E, B]` or `[E, B, *outputs]`, float32, float16, bfloat16 or float64.
        variances: like means; below eps they count as eps, through which gradients pass as they are.
        target: `[B, *outputs]` for all members or `[E, B, *outputs]`.
        row_weight: `[B]` or `[E, B]`, at least 0, as of :func:`ensemble_cross_entropy`.
        full: with the constant in brackets.
        eps: the least variance.
        reduction: as of :func:`ensemble_cross_entropy`; outputs of a row are averaged, but for "none".

    Returns:
        A number, `[E]` or a tensor like means, float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit; a negative variance, where it can be seen; a reduction that there is
            not.

    Example:
        >>> import torch, effens_kernels as ek
        >>> means, variances = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.ones(2, 2)  # 2 members, 2 rows
        >>> ek.losses.ensemble_gaussian_nll(means, variances, torch.tensor([1.0, 2.0]), reduction="members")
        tensor([0., 1.])
    """
    op = "losses.ensemble_gaussian_nll"
    means, target, row_weight = _regression(op, means, target, row_weight, reduction)
    check_tensor(op, "variances", variances)
    if variances.shape != means.shape or variances.device != means.device:
        reject(op, "variances", f"{list(means.shape)} on {means.device} like means", variances)
    if has_values(variances) and bool((variances < 0).any()):
        reject(op, "variances", "at least 0", f"{variances.min().item()}")
    if not isinstance(eps, (int, float)) or not eps > 0:
        reject(op, "eps", "a number above 0", repr(eps))
    variances = variances.to(means.dtype)
    variances = variances + (variances.clamp(min=eps) - variances).detach()
    found = 0.5 * (variances.log() + (target - means).square() / variances)
    return _reduce(found + 0.5 * log(2 * pi) if full else found, row_weight, reduction)


def ensemble_mse(means: Tensor, target: Tensor, *, row_weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    r"""Mean over the members of each one's mean squared error; never that of their mean prediction.

    .. math:: L = \frac{1}{E} \sum_e \frac{\sum_b r_{eb} \, (\mu_{eb} - y_{eb})^2}{\sum_b r_{eb}}

    which exceeds the error of the mean by the variance of the members (the ambiguity decomposition, Krogh and Vedelsby
    1995, equation 6).

    Args:
        means: `[E, B]` or `[E, B, *outputs]`, float32, float16, bfloat16 or float64.
        target: `[B, *outputs]` for all members or `[E, B, *outputs]`.
        row_weight: `[B]` or `[E, B]`, at least 0, as of :func:`ensemble_cross_entropy`.
        reduction: as of :func:`ensemble_cross_entropy`; outputs of a row are averaged, but for "none".

    Returns:
        A number, `[E]` or a tensor like means, float32 or float64.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported dtype.
        ValueError: shapes or devices do not fit; a reduction that there is not.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ek.losses.ensemble_mse(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([1.0, 2.0]))
        tensor(1.)
    """
    means, target, row_weight = _regression("losses.ensemble_mse", means, target, row_weight, reduction)
    return _reduce((means - target).square(), row_weight, reduction)


def bootstrap_weights(
    num_members: int,
    num_rows: int,
    *,
    method: str = "multinomial",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""How often each row counts for each member: weights for the losses above, in place of resampled data.

    .. math:: r_e \sim \mathrm{Multinomial}(B; 1/B, \ldots, 1/B), \quad r_{eb} \sim \mathrm{Poisson}(1) \quad
              \text{or} \quad r_{eb} \sim 2 \, \mathrm{Bernoulli}(1/2)

    all of mean 1.  "multinomial" is the bootstrap itself, B rows drawn with replacement (Efron 1979).  The others draw
    each row on its own, so that they fit data that come in batches: "poisson" is the limit of the bootstrap for many
    rows (Oza and Russell 2001, "Online Bagging and Boosting"), "double_or_nothing" leaves out half of them (Owen and
    Eckles 2012; bootstrapped DQN, Osband et al. 2016, uses such masks).

    Args:
        num_members: E.
        num_rows: B.
        method: "multinomial", "poisson" or "double_or_nothing".
        generator: where randomness comes from; None: PyTorch's own.
        device, dtype: of the result.

    Returns:
        `[E, B]`, whole numbers of at least 0.

    Raises:
        TypeError: num_members or num_rows is no int.
        ValueError: one of them is negative; a method that there is not.

    Example:
        >>> import torch, effens_kernels as ek
        >>> weights = ek.losses.bootstrap_weights(5, 100, generator=torch.Generator().manual_seed(0))
        >>> weights.shape, weights.sum(1)
        (torch.Size([5, 100]), tensor([100., 100., 100., 100., 100.]))
    """
    op = "losses.bootstrap_weights"
    for name, value in (("num_members", num_members), ("num_rows", num_rows)):
        if not isinstance(value, int) or isinstance(value, bool):
            reject(op, name, "an int of at least 0", repr(value), TypeError)
        if value < 0:
            reject(op, name, "an int of at least 0", repr(value))
    if method not in METHODS:
        reject(op, "method", f"one of {', '.join(map(repr, METHODS))}", repr(method))
    shape, options = (num_members, num_rows), {"device": device, "dtype": dtype}
    if method == "poisson":
        return torch.poisson(torch.ones(shape, device=device), generator=generator).to(dtype)
    if method == "double_or_nothing":
        return 2 * torch.randint(2, shape, generator=generator, **options)
    drawn = torch.randint(max(1, num_rows), shape, generator=generator, device=device)
    return torch.zeros(shape, **options).scatter_add_(1, drawn, torch.ones(shape, **options))


def _reduce(found: Tensor, row_weight: Tensor | None, reduction: str, counts: Tensor | None = None) -> Tensor:
    """Of losses [E, *]; `counts`, of the same shape, is what one that is counted once adds to the number of them."""
    if row_weight is not None:
        row_weight = row_weight.view(*row_weight.shape, *(1 for _ in found.shape[row_weight.dim() :]))
        found = (found * row_weight).masked_fill(row_weight == 0, 0)  # inf too: the row is not there
        counts = row_weight.expand_as(found) if counts is None else counts * row_weight
    if reduction == "none":
        return found
    rows = len(found), prod(found.shape[1:])
    found = found.reshape(rows)
    if counts is None:
        members = found.mean(1)
    else:
        total = counts.reshape(rows).sum(1)
        if row_weight is not None:
            total = torch.where(total == 0, 1, total)
        members = found.sum(1) / total
    if reduction == "members":
        return members
    return members.mean() if reduction == "mean" else members.sum()


def _regression(
    op: str, means: Tensor, target: Tensor, row_weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    check_tensor(op, "means", means)
    if means.dim() < 2 or means.shape[0] == 0:
        reject(op, "means", "[E, B, *outputs] of at least one member", means)
    _check_reduction(op, reduction)
    check_tensor(op, "target", target)
    target = _of_members(op, "target", target, means, means.shape[1:])
    row_weight = _row_weight(op, row_weight, means, means.shape[1:2])
    return means.to(_wide(means)), target.to(_wide(means)), row_weight


def _of_members(op: str, argument: str, value: Tensor, first: Tensor, shape: list[int]) -> Tensor:
    """[*shape], the same for all members, or [E, *shape]; as the latter."""
    members, shape = first.shape[0], list(shape)
    if list(value.shape) not in (shape, [members, *shape]):
        reject(op, argument, f"{shape} or {[members, *shape]}", value)
    if value.device != first.device:
        reject(op, argument, f"on {first.device} like the predictions", value)
    return value.expand(members, *shape)


def _row_weight(op: str, row_weight: Tensor | None, first: Tensor, batch: list[int]) -> Tensor | None:
    if row_weight is None:
        return None
    if not isinstance(row_weight, Tensor):
        reject(op, "row_weight", "None or a torch.Tensor", row_weight, TypeError)
    row_weight = _of_members(op, "row_weight", row_weight, first, batch)
    if has_values(row_weight) and bool((row_weight < 0).any()):
        reject(op, "row_weight", "at least 0", f"{row_weight.min().item()}")
    return row_weight.to(_wide(first))


def _smoothing(op: str, value: float | Tensor, logits: Tensor) -> float | Tensor:
    members = logits.shape[0]
    if isinstance(value, Tensor):
        check_tensor(op, "label_smoothing", value)
        if value.shape != (members,) or value.device != logits.device:
            reject(op, "label_smoothing", f"a number or [E={members}] on {logits.device}", value)
        if has_values(value) and not bool(((value >= 0) & (value <= 1)).all()):
            reject(op, "label_smoothing", "from 0 to 1", f"{value.tolist()}")
        return value.to(_wide(logits))
    if not isinstance(value, (int, float)):
        reject(op, "label_smoothing", "a number or a tensor [E]", value, TypeError)
    if not 0 <= value <= 1:
        reject(op, "label_smoothing", "from 0 to 1", repr(value))
    return float(value)


def _check_classes(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    if not has_values(target):
        return
    for wrong in target[((target < 0) | (target >= classes)) & (target != ignore_index)].flatten()[:1].tolist():
        reject(op, "target", f"classes from 0 to C - 1 = {classes - 1}, or ignore_index={ignore_index}", f"{wrong}")


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        reject(op, "reduction", f"one of {', '.join(map(repr, REDUCTIONS))}", repr(reduction))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
