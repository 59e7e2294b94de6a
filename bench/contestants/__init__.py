"""One file an op: how each contestant computes its workloads.  A new op adds its SUITE here."""

from . import (
    batchensemble,
    grouped_linear,
    indexed_linear,
    layer_ensemble,
    mix_templates,
    mixture_conv2d,
    mixture_linear,
    models,
    predict,
    ragged_linear,
    rank1_conv2d,
)
from .base import Contestant, NotApplicableError, Problem, Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        models.SUITE,
        grouped_linear.SUITE,
        indexed_linear.SUITE,
        ragged_linear.SUITE,
        batchensemble.SUITE,
        rank1_conv2d.SUITE,
        mix_templates.SUITE,
        mixture_linear.SUITE,
        mixture_conv2d.SUITE,
        layer_ensemble.SUITE,
        predict.SUITE,
    )
}

__all__ = ["SUITES", "Contestant", "NotApplicableError", "Problem", "Suite"]
