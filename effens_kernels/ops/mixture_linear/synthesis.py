"""mixture_linear as two ops of one backend: weights mixed, then one linear layer per member.

The weights are mixed again for backward, which is cheaper than to keep them: E*O*I numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor


def over(mixing: ModuleType, linear: ModuleType) -> tuple[Callable, Callable]:
    """(fwd, bwd) of mixture_linear from those of mix_templates and grouped_linear."""

    def weights(coefficients: Tensor, templates: Tensor) -> Tensor:
        return mixing.fwd(coefficients, _flat(templates)).view(coefficients.shape[0], *templates.shape[1:])

    def fwd(x, coefficients, templates, bias, activation, save_preactivation):
        return linear.fwd(x, weights(coefficients, templates), bias, activation, save_preactivation)

    def bwd(grad, x, coefficients, templates, saved, activation, need_x, need_coefficients, need_templates, need_bias):
        need_mixing = need_coefficients or need_templates
        if need_x:
            weight = weights(coefficients, templates)
        else:  # not read
            weight = templates.new_empty(()).expand(coefficients.shape[0], *templates.shape[1:])
        dx, dweight, db = linear.bwd(grad, x, weight, saved, activation, need_x, need_mixing, need_bias)
        dcoefficients, dtemplates = x.new_empty(0), x.new_empty(0)
        if need_mixing:
            needed = need_coefficients, need_templates
            dcoefficients, dtemplates = mixing.bwd(_flat(dweight), coefficients, _flat(templates), *needed)
            dtemplates = dtemplates.view(templates.shape) if need_templates else dtemplates
        return dx, dcoefficients, dtemplates, db

    return fwd, bwd


def _flat(weights: Tensor) -> Tensor:
    """[n, O, I] as [n, O*I]; by a view where that can be, which batched gradients need."""
    return weights.reshape(weights.shape[0], weights.shape[1] * weights.shape[2])
