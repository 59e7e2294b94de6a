"""Ensembles over several processes: members dealt out along a dimension of a DeviceMesh, predictions of all of them."""

from .sharding import ShardedEnsemble, local_members, shard

__all__ = ["ShardedEnsemble", "local_members", "shard"]
