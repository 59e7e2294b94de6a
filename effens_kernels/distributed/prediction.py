"""The predictions of an ensemble whose members are in several processes: as of all members, in every process.

Each process sums up its own members by the op that does it for one process.  What goes over the network is two sums,
of 3 B C numbers together and some B, whatever E is.  The results are those of one process but for rounding: means and
variances are combined by the pooled formulas, votes are counted, and the entropy is that of the combined mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops import Prediction, RegressionPrediction
from ..ops._checks import check_alike, check_tensor, reject
from ._mesh import axis_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@torch.no_grad()
def ensemble_predict(
    logits: Tensor, mesh: DeviceMesh, dim: str = "members", *, backend: str | None = None
) -> Prediction:
    r""":func:`effens_kernels.ensemble_predict` of the members of all processes, in each of them.

    With :math:`n_k` members in process k, the mean :math:`\bar p_k` and variance :math:`\sigma_k^2` of their
    probabilities, and their mutual information :math:`\mathcal{I}_k`:

    .. math::
        \bar p = \sum_k \tfrac{n_k}{E} \bar p_k \qquad
        \sigma^2 = \sum_k \tfrac{n_k}{E} \bigl(\sigma_k^2 + (\bar p_k - \bar p)^2\bigr) \qquad
        \mathcal{I} = \sum_k \tfrac{n_k}{E} \bigl(\mathcal{I}_k + \mathrm{KL}(\bar p_k \| \bar p)\bigr)

    the variance as Chan et al. 1979 pool it ("Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances").  Every process of the dimension calls this, with the same rows.

    Args:
        logits: `[E_own, *batch, C]`, of this process's members, as a :class:`ShardedEnsemble` gives them; 0 members are
            taken.
        mesh, dim: as for :func:`effens_kernels.shard`.
        backend: of each process's own part, as in :func:`effens_kernels.ensemble_predict`.

    Returns:
        A `Prediction` of all members, in float32, or float64 for float64 logits.  Not differentiable.

    Raises:
        TypeError: logits are no tensor, or of an unsupported dtype; `mesh` is no `DeviceMesh`.
        ValueError: logits are not `[E_own, *batch, C]`, without classes, or on another device than the mesh; the mesh
            has no dimension of this name; as the op says.

    Example:
        >>> import torch, effens_kernels as ek
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("members",))
        >>> logits = torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]])  # 2 members, 2 rows
        >>> ek.distributed.ensemble_predict(logits, mesh).disagreement
        tensor([0., 1.])
        >>> torch.distributed.destroy_process_group()
    """
    name = "distributed.ensemble_predict"
    group = _checked(name, "logits", logits, mesh, dim, "[E_own, *batch, C]", 2)
    if logits.shape[-1] == 0:
        reject(name, "logits", "[E_own, *batch, C] of at least one class", logits)
    own, *batch, classes = logits.shape
    found = ops.ensemble_predict(logits, backend=backend) if own else _nothing(Prediction, batch, classes, logits)
    local = found.mean_probs
    votes, index = torch.zeros_like(local), torch.arange(classes, device=logits.device)
    for predicted in logits.argmax(-1):
        votes += predicted.unsqueeze(-1) == index
    members, total, expected, votes = _sums(
        group, local.new_full((), own), own * local, own * found.expected_entropy, votes
    )
    mean = total / members
    apart = local - mean
    # KL(local || mean), in terms that are not negative, and accurate where the two are near and where they are not.
    near = apart > -0.5 * mean
    close = (apart / _nonzero(mean)).masked_fill(~near, 0).log1p()
    ratio = torch.where(near, close, _nonzero(local).log() - _nonzero(mean).log())
    information = found.mutual_information + (local * ratio - apart).sum(-1).clamp_min(0)
    spread, information = _sums(group, own * (found.variance + apart.square()), own * information)
    entropy = -torch.special.xlogy(mean, mean).sum(-1)
    agreeing = (votes * (votes - 1)).sum(-1) / (members * (members - 1)).clamp_min(1)
    disagreement = torch.where(members > 1, 1 - agreeing, 0).where(~entropy.isnan(), entropy)
    return Prediction(mean, spread / members, entropy, expected / members, information / members, disagreement)


@torch.no_grad()
def ensemble_predict_regression(
    means: Tensor,
    variances: Tensor | None,
    mesh: DeviceMesh,
    dim: str = "members",
    *,
    backend: str | None = None,
) -> RegressionPrediction:
    r""":func:`effens_kernels.ensemble_predict_regression` of the members of all processes, in each of them.

    .. math::
        \mu = \sum_k \tfrac{n_k}{E} \mu_k \qquad
        \sigma^2_\mathrm{epistemic} = \sum_k \tfrac{n_k}{E} \bigl(\sigma_k^2 + (\mu_k - \mu)^2\bigr)

    of the means :math:`\mu_k` and their variances :math:`\sigma_k^2` over the :math:`n_k` members of process k.

    Args:
        means: `[E_own, *batch]`, of this process's members; 0 members are taken.
        variances: None in every process, or `[E_own, *batch]`.
        mesh, dim: as for :func:`effens_kernels.shard`.
        backend: of each process's own part.

    Returns:
        A `RegressionPrediction` of all members, in float32, or float64 for float64.  Not differentiable.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype; `mesh` is no `DeviceMesh`.
        ValueError: shapes or devices differ; the mesh has no dimension of this name; as the op says.

    Example:
        >>> import torch, effens_kernels as ek
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("members",))
        >>> means = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # 2 members, 2 rows
        >>> ek.distributed.ensemble_predict_regression(means, None, mesh).epistemic
        tensor([1., 0.])
        >>> torch.distributed.destroy_process_group()
    """
    name = "distributed.ensemble_predict_regression"
    group = _checked(name, "means", means, mesh, dim, "[E_own, *batch]", 1)
    if variances is not None:
        check_tensor(name, "variances", variances)
        check_alike(name, "means", means, "variances", variances)
        if variances.shape != means.shape:
            reject(name, "variances", f"{list(means.shape)} like means", variances)
    own, *batch = means.shape
    if own:
        found = ops.ensemble_predict_regression(means, variances, backend=backend)
    else:
        found = _nothing(RegressionPrediction, batch, None, means)
    members, total, aleatoric = _sums(group, found.mean.new_full((), own), own * found.mean, own * found.aleatoric)
    mean, aleatoric = total / members, aleatoric / members
    (spread,) = _sums(group, own * (found.epistemic + (found.mean - mean).square()))
    epistemic = spread / members
    return RegressionPrediction(mean, aleatoric + epistemic, aleatoric, epistemic)


def _checked(name: str, argument: str, t: Tensor, mesh: DeviceMesh, dim: str, expected: str, axes: int) -> ProcessGroup:
    """The processes that have the other members."""
    check_tensor(name, argument, t)
    if t.dim() < axes:
        reject(name, argument, expected, t)
    axis = axis_of(name, mesh, dim)
    if t.device.type != mesh.device_type:
        reject(name, argument, f"on {mesh.device_type} like the mesh", t)
    return mesh.get_group(axis)


def _nothing(kind: type, batch: list[int], classes: int | None, like: Tensor) -> Prediction | RegressionPrediction:
    """What a process without members adds: zeros."""
    zeros = torch.zeros(batch, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    wide = ("mean_probs", "variance") if classes is not None else ()
    return kind(*(zeros.unsqueeze(-1).repeat(*[1] * len(batch), classes) if f in wide else zeros for f in kind._fields))


def _nonzero(p: Tensor) -> Tensor:
    return p.masked_fill(p == 0, 1)


def _sums(group: ProcessGroup, *parts: Tensor) -> Sequence[Tensor]:
    """Each summed over the processes, in one message."""
    import torch.distributed as dist

    message = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(message, group=group)
    return [part.view(own.shape) for part, own in zip(message.split([p.numel() for p in parts]), parts)]
