"""Ensembles over several processes: members dealt out along a dimension of a DeviceMesh, predictions of all of them."""

from .prediction import ensemble_predict, ensemble_predict_regression
from .sharding import ShardedEnsemble, local_members, shard

__all__ = ["ShardedEnsemble", "ensemble_predict", "ensemble_predict_regression", "local_members", "shard"]
