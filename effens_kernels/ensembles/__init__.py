"""Whole models: a plain model becomes an ensemble.  One file a method, each an entry of the table in convert.py.

And which members of an ensemble to run: ranking.py.
"""

from ._ensemble import Ensemble
from .batch_ensemble import BatchEnsemble
from .batchnorm import update_batchnorm
from .convert import convert
from .masksembles import MasksemblesEnsemble
from .mc_dropout import MCDropoutEnsemble
from .mimo import MIMOEnsemble, mimo_batch
from .mixture import MixtureEnsemble
from .ranking import PathRanking, gaussian_kl, rank_paths
from .selection import EarlyStopping, Selection, select_members, take_members
from .snapshot import SnapshotEnsemble
from .stack import StackedEnsemble, stack, unstack
from .sub_ensemble import SubEnsemble
from .swag import SWAG
from .widths import pad_widths, unpad_widths

__all__ = [
    "SWAG",
    "BatchEnsemble",
    "EarlyStopping",
    "Ensemble",
    "MCDropoutEnsemble",
    "MIMOEnsemble",
    "MasksemblesEnsemble",
    "MixtureEnsemble",
    "PathRanking",
    "Selection",
    "SnapshotEnsemble",
    "StackedEnsemble",
    "SubEnsemble",
    "convert",
    "gaussian_kl",
    "mimo_batch",
    "pad_widths",
    "rank_paths",
    "select_members",
    "stack",
    "take_members",
    "unpad_widths",
    "unstack",
    "update_batchnorm",
]
