"""Whole models: a plain model becomes an ensemble.  One file a method, each an entry of the table in convert.py.

And which members of an ensemble to run: ranking.py.
"""

from ._ensemble import Ensemble
from .batch_ensemble import BatchEnsemble
from .convert import convert
from .mixture import MixtureEnsemble
from .ranking import PathRanking, gaussian_kl, rank_paths
from .stack import StackedEnsemble, stack, unstack

__all__ = [
    "BatchEnsemble",
    "Ensemble",
    "MixtureEnsemble",
    "PathRanking",
    "StackedEnsemble",
    "convert",
    "gaussian_kl",
    "rank_paths",
    "stack",
    "unstack",
]
