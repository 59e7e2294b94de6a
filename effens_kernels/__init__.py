"""effens_kernels: neural-network ensembles at the cost of the matrix products they cannot avoid."""

from . import distributed, ensembles, exchange, losses, metrics, nn, optim
from ._config import show_config
from ._version import __version__
from .distributed import shard
from .ensembles import convert, stack, unstack
from .ops import (
    Prediction,
    RegressionPrediction,
    ensemble_mlp,
    ensemble_predict,
    ensemble_predict_regression,
    grouped_linear,
    indexed_linear,
    mix_templates,
    mixture_conv1d,
    mixture_conv2d,
    mixture_conv_transpose2d,
    mixture_linear,
    multihead_linear,
    ragged_linear,
    rank1_conv1d,
    rank1_conv2d,
    rank1_conv_transpose2d,
    rank1_linear,
    rank1_mlp,
)

__all__ = [
    "Prediction",
    "RegressionPrediction",
    "__version__",
    "convert",
    "distributed",
    "ensemble_mlp",
    "ensemble_predict",
    "ensemble_predict_regression",
    "ensembles",
    "exchange",
    "grouped_linear",
    "indexed_linear",
    "losses",
    "metrics",
    "mix_templates",
    "mixture_conv1d",
    "mixture_conv2d",
    "mixture_conv_transpose2d",
    "mixture_linear",
    "multihead_linear",
    "nn",
    "optim",
    "ragged_linear",
    "rank1_conv1d",
    "rank1_conv2d",
    "rank1_conv_transpose2d",
    "rank1_linear",
    "rank1_mlp",
    "shard",
    "show_config",
    "stack",
    "unstack",
]
