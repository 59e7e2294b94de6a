"""Whole models: a plain model becomes an ensemble.  One file a method, each an entry of the table in convert.py.

And which members of an ensemble to run: ranking.py.
"""

from ._ensemble import Ensemble
from .batchnorm import update_batchnorm
from .convert import convert
from .masksembles import MasksemblesEnsemble
from .mc_dropout import MCDropoutEnsemble
from .mixture import MixtureEnsemble
from .ranking import PathRanking, gaussian_kl, rank_paths
from .snapshot import SnapshotEnsemble
from .stack import StackedEnsemble, stack, unstack
from .swag import SWAG

__all__ = [
    "SWAG",
    "Ensemble",
    "MCDropoutEnsemble",
    "MasksemblesEnsemble",
    "MixtureEnsemble",
    "PathRanking",
    "SnapshotEnsemble",
    "StackedEnsemble",
    "convert",
    "gaussian_kl",
    "rank_paths",
    "stack",
    "unstack",
    "update_batchnorm",
]
