"""Layers: parameters named as in torch.nn, constructors mirror torch.nn plus `num_members`."""

from .attention import BatchEnsembleMultiheadAttention
from .bank import TemplateBank
from .batchensemble import BatchEnsembleLinear
from .batchensemble_conv import BatchEnsembleConv1d, BatchEnsembleConv2d, BatchEnsembleConvTranspose2d
from .batchensemble_mlp import BatchEnsembleMLP
from .embedding import BatchEnsembleEmbedding
from .group_norm import EnsembleGroupNorm
from .layer_ensemble import LayerEnsemble
from .linear import EnsembleLinear, MultiHeadLinear
from .mixture import MixtureConv2d, MixtureLinear
from .mlp import EnsembleMLP
from .norm import EnsembleBatchNorm1d, EnsembleBatchNorm2d, EnsembleBatchNorm3d, EnsembleLayerNorm

__all__ = [
    "BatchEnsembleConv1d",
    "BatchEnsembleConv2d",
    "BatchEnsembleConvTranspose2d",
    "BatchEnsembleEmbedding",
    "BatchEnsembleLinear",
    "BatchEnsembleMLP",
    "BatchEnsembleMultiheadAttention",
    "EnsembleBatchNorm1d",
    "EnsembleBatchNorm2d",
    "EnsembleBatchNorm3d",
    "EnsembleGroupNorm",
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "LayerEnsemble",
    "MixtureConv2d",
    "MixtureLinear",
    "MultiHeadLinear",
    "TemplateBank",
]
