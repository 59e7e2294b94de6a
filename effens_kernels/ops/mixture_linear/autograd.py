"""mixture_linear's derivatives, as those of a linear form.

With W_e = sum_t alpha_et T_t, g = dL/dz and G_e = g_e^T x_e:

    dx_e = g_e W_e  (summed over e where x is shared)      dalpha_et = <G_e, T_t>
    dT_t = sum_e alpha_et G_e                              db_e = sum_b g_e
"""

from __future__ import annotations

from .._linear_form import LinearForm
from .._member_batching import register_vmap

FORM = LinearForm(
    "mixture_linear",
    ("x", "coefficients", "templates"),
    lambda x, coefficients, templates: (coefficients.shape[0], x.shape[-2], templates.shape[1]),
)
register_vmap(FORM, shared="templates")
