"""update_batchnorm: running statistics of all members in one pass over data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.norm import _EnsembleBatchNorm
from ..ops._checks import reject
from ._surgery import unwrapped


@torch.no_grad()
def update_batchnorm(ensemble: nn.Module, loader: Iterable[object], device: torch.device | str | None = None) -> None:
    r"""Compute the running statistics of BatchNorm layers anew, for all members in one pass over the data.

    .. math:: \mu_e = \frac{1}{n} \sum_{i=1}^{n} \mu_{ei}, \qquad \sigma^2_e = \frac{1}{n} \sum_{i=1}^{n} \sigma^2_{ei}

    over the batches i, with the mean and unbiased variance of what a layer of member e gets: what
    `torch.optim.swa_utils.update_bn` computes for one model (which see), for each member alone.  Samples of weights
    (:class:`SWAG`) need it, since statistics of other weights do not fit them.

    Args:
        ensemble: one of :func:`effens_kernels.stack` or :func:`effens_kernels.convert`, or any module; also wrapped in
            DistributedDataParallel, DataParallel or torch.compile.  It runs in training mode, and has its modes and
            momenta again afterwards.
        loader: batches: tensors, or lists and tuples whose first element is the input.  All members see the same rows.
        device: where batches are to be moved; None: nowhere.

    Raises:
        TypeError: `ensemble` is no module.
        ValueError: there are no batches.

    Example:
        >>> import torch, effens_kernels as ek
        >>> models = [torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)) for _ in range(3)]
        >>> ensemble, batches = ek.stack(models), torch.randn(10, 32, 8)
        >>> ek.ensembles.update_batchnorm(ensemble, batches)
        >>> torch.optim.swa_utils.update_bn(batches, models[1])
        >>> torch.allclose(ensemble.get_buffer("1.running_var")[1], models[1][1].running_var, atol=1e-5)
        True
    """
    ensemble = unwrapped(ensemble)
    if not isinstance(ensemble, nn.Module):
        reject("update_batchnorm", "ensemble", "a torch.nn.Module", type(ensemble).__name__, TypeError)
    # A part of a stacked ensemble has the statistics of all members, and the layer of one that runs on them.
    layers = {module: vars(module).get("_plain", module) for module in ensemble.modules()}
    norms = {own: plain for own, plain in layers.items() if isinstance(plain, (_BatchNorm, _EnsembleBatchNorm))}
    if not norms:
        return
    batches = iter(loader)
    batch = next(batches, None)
    if batch is None:
        reject("update_batchnorm", "loader", "of at least one batch", "an empty one")

    for norm in norms:
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if norm._buffers.get(name) is not None:
                norm._buffers[name].fill_(value)
    modes = {module: module.training for module in (*layers, *layers.values())}
    momenta = {plain: plain.momentum for plain in norms.values()}
    hooks = [plain.register_forward_pre_hook(_Cumulative()) for plain in momenta]
    try:
        ensemble.train()
        while batch is not None:
            rows = batch[0] if isinstance(batch, (list, tuple)) else batch
            ensemble(rows if device is None else rows.to(device))
            batch = next(batches, None)
    finally:
        for hook in hooks:
            hook.remove()
        for plain, momentum in momenta.items():
            plain.momentum = momentum
        for module, training in modes.items():
            module.training = training


class _Cumulative:
    """Momentum that makes of running statistics the mean over all calls.

    `momentum=None` would do the same, but reads its count of calls from a tensor, of which members have one each.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls += 1
        norm.momentum = 1.0 / self.calls
