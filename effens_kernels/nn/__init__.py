"""Layers: parameters named as in torch.nn, constructors mirror torch.nn plus `num_members`."""

from .batchensemble import BatchEnsembleConv2d, BatchEnsembleLinear
from .linear import EnsembleLinear, MultiHeadLinear
from .mlp import EnsembleMLP
from .norm import EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleLayerNorm

__all__ = [
    "BatchEnsembleConv2d",
    "BatchEnsembleLinear",
    "EnsembleBatchNorm1d",
    "EnsembleBatchNorm2d",
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "MultiHeadLinear",
]
