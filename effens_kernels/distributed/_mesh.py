"""How members are dealt out to the processes of a mesh."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..ops._checks import reject

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Shares:
    """Members dealt out along a dimension of a mesh."""

    def __init__(self, mesh: DeviceMesh, axis: int, num_members: int) -> None:
        self.mesh, self.axis, self.num_members = mesh, axis, num_members
        self.own = members_of(mesh.get_local_rank(axis), mesh.size(axis), num_members)
        # Along the others, processes have the same members, and rows of their own.
        self.others = [other for other in range(mesh.ndim) if other != axis]
        self.replicas = prod(mesh.size(other) for other in self.others)
        # The processes that have the other members, and the same rows.
        self.members = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[axis]]


def members_of(rank: int, ranks: int, num_members: int) -> range:
    """As DTensor's Shard(0) deals, and torch.chunk."""
    each = -(-num_members // ranks)
    return range(min(rank * each, num_members), min((rank + 1) * each, num_members))


def axis_of(function: str, mesh: DeviceMesh, dim: str) -> int:
    """The dimension of the mesh that has this name."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        reject(function, "mesh", "a torch.distributed.device_mesh.DeviceMesh", type(mesh).__name__, TypeError)
    names = mesh.mesh_dim_names
    if mesh.get_coordinate() is None:
        reject(function, "mesh", "of processes of which this is one", repr(mesh))
    if names is None and mesh.ndim == 1:
        return 0
    if names is None or dim not in names:
        known = ", ".join(map(repr, names)) if names else "which need names"
        reject(function, "dim", f"one of the mesh's dimensions, {known}", repr(dim))
    return names.index(dim)
