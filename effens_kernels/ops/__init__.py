"""One folder an op: the public function with its checks, the plain-PyTorch reference, the kernels, the derivatives."""

from .ensemble_mlp import ensemble_mlp
from .ensemble_predict import Prediction, ensemble_predict
from .ensemble_predict_regression import RegressionPrediction, ensemble_predict_regression
from .grouped_linear import grouped_linear
from .indexed_linear import indexed_linear
from .mix_templates import mix_templates
from .mixture_conv2d import mixture_conv1d, mixture_conv2d, mixture_conv_transpose2d
from .mixture_linear import mixture_linear
from .multihead_linear import multihead_linear
from .ragged_linear import ragged_linear
from .rank1_conv2d import rank1_conv1d, rank1_conv2d, rank1_conv_transpose2d
from .rank1_linear import rank1_linear
from .rank1_mlp import rank1_mlp

__all__ = [
    "Prediction",
    "RegressionPrediction",
    "ensemble_mlp",
    "ensemble_predict",
    "ensemble_predict_regression",
    "grouped_linear",
    "indexed_linear",
    "mix_templates",
    "mixture_conv1d",
    "mixture_conv2d",
    "mixture_conv_transpose2d",
    "mixture_linear",
    "multihead_linear",
    "ragged_linear",
    "rank1_conv1d",
    "rank1_conv2d",
    "rank1_conv_transpose2d",
    "rank1_linear",
    "rank1_mlp",
]
