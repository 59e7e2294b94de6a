"""Layers: parameters named as in torch.nn, constructors mirror torch.nn plus `num_members`."""

from .bank import TemplateBank
from .batchensemble import BatchEnsembleConv2d, BatchEnsembleLinear
from .batchensemble_mlp import BatchEnsembleMLP
from .layer_ensemble import LayerEnsemble
from .linear import EnsembleLinear, MultiHeadLinear
from .mixture import MixtureConv2d, MixtureLinear
from .mlp import EnsembleMLP
from .norm import EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleLayerNorm

__all__ = [
    "BatchEnsembleConv2d",
    "BatchEnsembleLinear",
    "BatchEnsembleMLP",
    "EnsembleBatchNorm1d",
    "EnsembleBatchNorm2d",
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "LayerEnsemble",
    "MixtureConv2d",
    "MixtureLinear",
    "MultiHeadLinear",
    "TemplateBank",
]
