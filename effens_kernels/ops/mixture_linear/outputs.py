"""mixture_linear by mixing outputs: every row through every template, as the templates' linear layers, then

    u_t = x T_t^T,    z_e = sum_t alpha_et u_t + b_e

    h_t = sum_e alpha_et g_e,    dT_t = h_t^T x,    dx = sum_t h_t T_t,    dalpha_et = <g_e, u_t>

No weight of a member is ever made.  Rows that all members share are B, whatever E is, and u, T*B*O numbers, is worth
keeping for dalpha.  Rows per member are E*B, and each member takes its own of u, which is computed again for backward:
it is T times as large as y.
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
        """u: [T, B*O], or [T, E, B*O] where x has rows per member."""
        u, _ = linear.fwd(_rows(x), templates, None, None, False)
        return u.reshape(templates.shape[0], *x.shape[:-2], x.shape[-2] * templates.shape[1])

    def fwd(x, coefficients, templates, bias, activation, save_preactivation):
        u = through_templates(x, templates)
        if x.dim() == 2:
            z = mixing.fwd(coefficients, u)
        else:  # [E, 1, T] [E, T, B*O]
            z = torch.bmm(coefficients.unsqueeze(1), u.transpose(0, 1))
        z = z.view(coefficients.shape[0], x.shape[-2], templates.shape[1])
        if bias is not None:
            z += bias[:, None, :]
        kept = (u,) if x.dim() == 2 else ()
        return ACTIVATIONS[activation].apply(z), z if save_preactivation else x.new_empty(0), *kept

    def bwd(
        grad,
        x,
        coefficients,
        templates,
        saved,
        activation,
        need_x,
        need_coefficients,
        need_templates,
        need_bias,
        u=None,
    ):
        g = grad if activation is None else grad * ACTIVATIONS[activation].slope(saved)
        dx, dcoefficients, dtemplates, db = (x.new_empty(0) for _ in range(4))
        through = need_x or need_templates
        flat = g.reshape(g.shape[0], g.shape[1] * g.shape[2])
        if not need_coefficients:  # then u is not read
            u = g.new_empty(()).expand(templates.shape[0], flat.shape[1])
        elif u is None:
            u = through_templates(x, templates)
        if x.dim() == 2:
            dcoefficients, h = mixing.bwd(flat, coefficients, u, need_coefficients, through)
        else:
            if need_coefficients:
                with torch.autocast(g.device.type, enabled=False):  # wherever backward is called
                    dcoefficients = torch.bmm(flat.unsqueeze(1), u.permute(1, 2, 0)).squeeze(1)
            h = coefficients.t().contiguous()[:, :, None] * flat if through else dx
        if through:
            rows = _rows(x)
            h = h.reshape(templates.shape[0], rows.shape[0], templates.shape[1])
            dx, dtemplates, _ = linear.bwd(h, rows, templates, x.new_empty(0), None, need_x, need_templates, False)
            if need_x and x.dim() == 3:
                dx = dx.reshape(x.shape) if x.is_contiguous() else torch.empty_like(x).copy_(dx.reshape(x.shape))
        return dx, dcoefficients, dtemplates, g.sum(1) if need_bias else db

    return fwd, bwd


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[0] * x.shape[1], x.shape[2])
