"""Optimizers of ensembles whose members have hyperparameters of their own, and gradients clipped member by member."""

from .adamw import EnsembleAdamW
from .clipping import clip_grad_norm_
from .sgd import EnsembleSGD

__all__ = ["EnsembleAdamW", "EnsembleSGD", "clip_grad_norm_"]
