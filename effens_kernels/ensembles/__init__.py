"""Whole models: a plain model becomes an ensemble.  One file a method, each an entry of the table in convert.py."""

from ._ensemble import Ensemble
from .convert import convert
from .mixture import MixtureEnsemble
from .stack import StackedEnsemble, stack, unstack

__all__ = ["Ensemble", "MixtureEnsemble", "StackedEnsemble", "convert", "stack", "unstack"]
