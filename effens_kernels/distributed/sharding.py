"""shard: an ensemble whose members are dealt out to processes; each runs its own."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..ensembles import Ensemble
from ..nn._layout import positive
from ..nn._mixture import Mixture
from ..ops._checks import reject
from ._boundary import distributed, from_the_first, local_of, shared_input
from ._mesh import Shares, axis_of, members_of
from ._ownership import Layout, layout, takes_members

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedEnsemble(nn.Module):
    """An ensemble of which this process runs some members, as :func:`effens_kernels.shard` makes it.

    Parameters and buffers have the names that they have in the whole ensemble, and are DTensors of its shapes: sharded
    along the axis of members where members have values of their own, replicated where they share them.  Optimizers,
    gradient clipping by norm, `state_dict` and `torch.distributed.checkpoint` take them as any others;
    `parameter.full_tensor()` is the whole.

    `forward` takes the arguments of the whole ensemble, gives its result for this process's members, `[E_own, B, ...]`,
    in plain tensors, and does not communicate.  With `per_member=True` inputs may be of all members, of which this
    process takes its own, or of its own alone.  Backward communicates where parameters are shared by members, and where
    an input that all members see needs a gradient: these become sums over the members of all processes, as in the whole
    ensemble.  (A module made of layers of `ek.nn` alone knows which inputs these are; it gives the gradients of this
    process's members.)  So a loss adds up what the members' own losses are, or divides their sum by `num_members`;
    `.mean()` over the members of one process is another thing.

    Attributes:
        num_members: E, of all processes.
        members: which of them this process has, as a range.  The first processes have E / processes, rounded up, each;
            the last ones may have fewer, or none, and run all the same.
        local: the ensemble of these alone.  It shares this module's parameters, and runs only as part of it.
        mesh: as given to `shard`.

    Raises:
        ValueError: a per-member input is `[E, ...]` neither of all members nor of this process's; `member` is given.
        TypeError: an input is a DTensor.

    Example:
        >>> import torch, effens_kernels as ek
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("members",))
        >>> ensemble = ek.shard(ek.stack([torch.nn.Linear(8, 4) for _ in range(5)]), mesh)
        >>> ensemble(torch.randn(32, 8)).shape, ensemble.members, ensemble.weight.full_tensor().shape
        (torch.Size([5, 32, 4]), range(0, 5), torch.Size([5, 4, 8]))
        >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, local: nn.Module, shares: Shares) -> None:
        super().__init__()
        # One tree under two modules: this one, whose tensors have the names of the whole ensemble's, and `local`, which
        # is not registered and knows how to run.
        for tree in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[tree] = local.__dict__[tree]
        self.__dict__["local"] = local
        self._shares = shares
        self.training = local.training
        self.mesh, self.num_members, self.members = shares.mesh, shares.num_members, shares.own

    def forward(self, *args: object, **kwargs: object) -> object:
        from torch.distributed.tensor import DTensor

        leaves, spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, DTensor):
                reject("ShardedEnsemble", "input", "a plain tensor, the same in all processes", "a DTensor", TypeError)
        member = kwargs.get("member")
        if member is not None:
            expected = "None, as each process has some (the whole ensemble runs one member alone)"
            reject("ShardedEnsemble", "member", expected, repr(member))
        if takes_members(self.local):
            own = self._own_rows if kwargs.get("per_member") else self._shared_rows
            args, kwargs = pytree.tree_unflatten([own(t) if isinstance(t, Tensor) else t for t in leaves], spec)
        result = functional_call(self.local, self._local_tensors(), args, kwargs, tie_weights=False)
        return result if self.members else pytree.tree_map_only(Tensor, lambda t: t[:0], result)

    def _own_rows(self, t: Tensor) -> Tensor:
        if t.dim() < (2 if type(self.local).forward is Ensemble.forward else 1):
            return t
        own = self.members
        if t.shape[0] == self.num_members:
            t = t[own.start : own.stop]
        if t.shape[0] != len(own):
            expected = f"[E, ...] of all E={self.num_members} members or of {len(own)} here, with per_member=True"
            reject("ShardedEnsemble", "input", expected, t)
        return t if own else t.new_zeros((1, *t.shape[1:]))

    def _shared_rows(self, t: Tensor) -> Tensor:
        return shared_input(t, self._shares)

    def _local_tensors(self) -> dict[str, Tensor]:
        """Each place once: functional_call puts back the wrong one where a module has two names (torch 2.13)."""
        from torch.distributed.tensor import DTensor

        local: dict[int, Tensor] = {}  # what is tied stays so
        tensors: dict[str, Tensor] = {}
        for path, module in self.local.named_modules():
            for name, t in (*module._parameters.items(), *module._buffers.items()):
                if t is not None:
                    if id(t) not in local:
                        local[id(t)] = local_of(t, self._shares) if isinstance(t, DTensor) else t
                    tensors[f"{path}.{name}" if path else name] = local[id(t)]
        return tensors

    def train(self, mode: bool = True) -> ShardedEnsemble:
        self.local.train(mode)
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"members={list(self.members)} of {self.num_members}"


def local_members(num_members: int, mesh: DeviceMesh, dim: str = "members") -> range:
    """Which of E members :func:`shard` gives to this process: what a process has to make for `from_local=True`.

    Args:
        num_members: E, of all processes.
        mesh, dim: as for :func:`shard`.

    Returns:
        A range of at most E / processes, rounded up; the last processes may have fewer, or none.

    Raises:
        TypeError: `num_members` is no int; `mesh` is no `DeviceMesh`.
        ValueError: the mesh has no dimension of this name, or is not of this process.

    Example:
        >>> import torch, effens_kernels as ek
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> ek.distributed.local_members(5, init_device_mesh("cpu", (1,), mesh_dim_names=("members",)))
        range(0, 5)
        >>> torch.distributed.destroy_process_group()
    """
    positive("local_members", num_members=num_members)
    return Shares(mesh, axis_of("local_members", mesh, dim), num_members).own


def shard(ensemble: nn.Module, mesh: DeviceMesh, dim: str = "members", *, from_local: bool = False) -> ShardedEnsemble:
    """Deal the members of an ensemble out to the processes of a mesh, so that it may be larger than one device.

    Each process keeps and runs its members.  What members share is in all processes, and its gradients are sums over
    all of them.  Every process calls this, and makes the same ensemble before, or with `from_local=True` only its own
    part of it; nobody then ever has the whole.  Values that several processes have become those of the first of them.

    A mesh of more dimensions trains on several batches at once: processes along the others have the same members, each
    gives them rows of its own, and gradients become means over them, as with DistributedDataParallel.  Running
    statistics stay those of each process's rows.

    Dropout draws from each process's own generator.  For masks that differ between members of different processes, seed
    it by the process, after everything that all have in common: `torch.manual_seed(seed + rank)`; for the same masks in
    all members (`ek.stack(..., randomness="same")`) seed it the same.

    Args:
        ensemble: what `ek.stack` or `ek.convert` made, or a module of `ek.nn` layers with members (not
            `ek.nn.LayerEnsemble`).  It is taken over: go on with the result, and give its parameters to the optimizer.
        mesh: a `torch.distributed.device_mesh.DeviceMesh` of the ensemble's device.
        dim: the name of the mesh's dimension along which members are dealt out; a mesh of one dimension needs no names.
        from_local: `ensemble` has the members of this process alone, as many as :func:`local_members` says.

    Returns:
        A :class:`ShardedEnsemble`.

    Raises:
        TypeError: `ensemble` is no module; `mesh` is no `DeviceMesh`.
        ValueError: in every process, whichever has the fault: a mesh without this dimension; an ensemble that is
            sharded already, has no axis of members, parametrizations, or layers of which it is not known what members
            own; one on another device, or that differs between processes; a process without members, where neither
            `ek.stack` nor `ek.convert` made the ensemble; with `from_local`, not as many members as should be here.

    Example:
        >>> import torch, effens_kernels as ek
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("members",))
        >>> ensemble = ek.shard(ek.nn.EnsembleMLP(8, [64], 4, num_members=6), mesh)
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([6, 32, 4])
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(ensemble, nn.Module):
        reject("shard", "ensemble", "a torch.nn.Module", type(ensemble).__name__, TypeError)
    axis = axis_of("shard", mesh, dim)
    said: list = [None, None]
    try:
        _refuse(ensemble, mesh)
        found = layout(ensemble)
        said[0] = _description(found)
    except ValueError as error:
        said[1] = str(error)
    shares = Shares(mesh, axis, _num_members(said, mesh, axis, from_local))
    ranks = mesh.size(axis)
    if not takes_members(ensemble) and not members_of(ranks - 1, ranks, shares.num_members):
        expected = f"with members for each of {ranks} processes, or made by ek.stack or ek.convert"
        reject("shard", "ensemble", expected, f"{type(ensemble).__name__} of {shares.num_members} members")
    _deal(found, shares, from_local)
    return ShardedEnsemble(ensemble, shares)


def _refuse(ensemble: nn.Module, mesh: DeviceMesh) -> None:
    if isinstance(ensemble, ShardedEnsemble) or any(hasattr(p, "placements") for p in ensemble.parameters()):
        reject("shard", "ensemble", "not sharded yet", type(ensemble).__name__)
    for name, t in (*ensemble.named_parameters(), *ensemble.named_buffers()):
        if t.device.type != mesh.device_type:
            reject("shard", name, f"on {mesh.device_type} like the mesh", t)


def _description(found: Layout) -> tuple[int, list[tuple]]:
    """What processes compare: collectives of different tensors would wait for each other forever."""
    rows = [
        (p.path, tuple(p.tensor.shape[int(p.owned) :]), str(p.tensor.dtype), p.tensor.requires_grad, p.owned)
        for p in found.places
    ]
    return found.num_members, rows


def _num_members(said: list, mesh: DeviceMesh, axis: int, from_local: bool) -> int:
    """E, of all processes.  What is wrong in one process is an error in all, so that none waits for it."""
    import torch.distributed as dist

    everyone = {tuple(mesh.get_coordinate()): said}
    for direction in range(mesh.ndim):
        parts: list[dict] = [{}] * mesh.size(direction)
        dist.all_gather_object(parts, everyone, group=mesh.get_group(direction))
        everyone = {place: words for part in parts for place, words in part.items()}
    if said[1] is not None:
        raise ValueError(said[1])
    counts: dict[int, int] = {}
    for place, (description, error) in sorted(everyone.items(), key=lambda item: item[0]):
        where = f"in process {list(place)} of the mesh"
        if error is not None:
            raise ValueError(f"{error} ({where})")
        (_, mine), (members, rows) = said[0], description
        if rows != mine:
            differing = next(((a, b) for a, b in zip_longest(mine, rows) if a != b))
            reject("shard", "ensemble", f"the same in all processes, {differing[0]}", f"{differing[1]} {where}")
        of_rank = counts.setdefault(place[axis] if from_local else 0, members)
        if members != of_rank:
            reject("shard", "ensemble", f"of {of_rank} members", f"{members} {where}")
    total = sum(counts.values())
    for rank, members in counts.items() if from_local else ():
        own = len(members_of(rank, mesh.size(axis), total))
        if members != own:
            expected = f"of {own} of all {total} members in process {rank}"
            reject("shard", "ensemble", expected, f"one of {members} (from_local=True)")
    return total


@torch.no_grad()
def _deal(found: Layout, shares: Shares, from_local: bool) -> None:
    """Put this process's part in place of each tensor, and its number of members in place of E."""
    own = shares.own
    dealt: dict[int, Tensor] = {}
    for place in found.places:
        whole = place.tensor
        if id(whole) not in dealt:
            part = whole.detach()
            if place.owned and not from_local:
                part = part[own.start : own.stop].clone()  # so that memory of the others is free
            from_the_first(part, shares, place.owned)
            dealt[id(whole)] = whole
            if place.owned or place.kind == "_parameters":
                dealt[id(whole)] = distributed(part, shares, place.owned)
            if place.kind == "_parameters":
                dealt[id(whole)] = nn.Parameter(dealt[id(whole)], whole.requires_grad)
        getattr(place.module, place.kind)[place.name] = dealt[id(whole)]
    for module in found.counted:
        module.num_members = len(own) or 1
        if isinstance(module, Mixture) and module.disjoint:  # each member's templates are the next in the bank
            shift = (module.run.shift + own.start * module.num_templates) % module.run.span
            module.run = module.run._replace(shift=shift)
