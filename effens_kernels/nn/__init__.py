"""Layers: parameters named as in torch.nn, constructors mirror torch.nn plus `num_members`."""

from .linear import EnsembleLinear, MultiHeadLinear
from .mlp import EnsembleMLP

__all__ = ["EnsembleLinear", "EnsembleMLP", "MultiHeadLinear"]
