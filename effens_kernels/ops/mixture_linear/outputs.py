"""mixture_linear by mixing outputs: every row through every template, as the templates' linear layers, then

    u_t = x T_t^T,    z_e = sum_t alpha_et u_t + b_e

    h_t = sum_e alpha_et g_e,    dT_t = h_t^T x,    dx = sum_t h_t T_t,    dalpha_et = <g_e, u_t>

No weight of a member is ever made.  Rows that all members share are B, whatever E is; rows per member are E*B, and each
member takes its own of u.  u is computed again for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .._activations import ACTIVATIONS


def over(mixing: ModuleType, linear: ModuleType) -> tuple[Callable, Callable]:
    """(fwd, bwd) of mixture_linear from those of mix_templates and grouped_linear."""

    def through_templates(x: Tensor, templates: Tensor) -> Tensor:
        """u: [T, B, O], or [T, E, B, O] where x has rows per member."""
        u, _ = linear.fwd(x if x.dim() == 2 else x.flatten(0, 1), templates, None, None, False)
        return u.view(templates.shape[0], *x.shape[:-1], templates.shape[1])

    def fwd(x, coefficients, templates, bias, activation, save_preactivation):
        u = through_templates(x, templates)
        if x.dim() == 2:
            z = mixing.fwd(coefficients, u.flatten(1)).view(coefficients.shape[0], *u.shape[1:])
        else:
            z = (coefficients.t().contiguous()[:, :, None, None] * u).sum(0)
        if bias is not None:
            z += bias[:, None, :]
        return ACTIVATIONS[activation].apply(z), z if save_preactivation else x.new_empty(0)

    def bwd(grad, x, coefficients, templates, saved, activation, *need):
        need_x, need_coefficients, need_templates, need_bias = need
        g = grad if activation is None else grad * ACTIVATIONS[activation].slope(saved)
        dx, dcoefficients, dtemplates, db = (x.new_empty(0) for _ in need)
        u = through_templates(x, templates) if need_coefficients else dcoefficients
        through = need_x or need_templates
        if x.dim() == 2:
            u = u if need_coefficients else g.new_empty(()).expand(templates.shape[0], *g.shape[1:])  # not read
            dcoefficients, h = mixing.bwd(g.flatten(1), coefficients, u.flatten(1), need_coefficients, through)
        else:
            if need_coefficients:  # [E, 1, B*O] [E, B*O, T]
                dcoefficients = torch.bmm(g.flatten(1).unsqueeze(1), u.flatten(2).permute(1, 2, 0)).squeeze(1)
            h = coefficients.t().contiguous()[:, :, None, None] * g if through else dx
        if through:
            rows = x if x.dim() == 2 else x.flatten(0, 1)
            h = h.view(templates.shape[0], rows.shape[0], templates.shape[1])
            dx, dtemplates, _ = linear.bwd(h, rows, templates, x.new_empty(0), None, need_x, need_templates, False)
            if need_x and x.dim() == 3:
                dx = torch.empty_like(x).copy_(dx.view(x.shape)) if not x.is_contiguous() else dx.view(x.shape)
        return dx, dcoefficients, dtemplates, g.sum(1) if need_bias else db

    return fwd, bwd
