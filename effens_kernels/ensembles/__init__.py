"""Whole models: a plain model becomes an ensemble.  One file a method, each an entry of the table in convert.py."""

from ._ensemble import Ensemble
from .convert import convert
from .mixture import MixtureEnsemble

__all__ = ["Ensemble", "MixtureEnsemble", "convert"]
