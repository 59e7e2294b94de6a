"""rank1_linear's derivatives, as those of a linear form.

With g = dL/dz and G_e = g_e^T x_e:

    dx_e = ((g_e * s_e) W) * r_e  (summed over e where x is shared)      dW = sum_e s_e * G_e * r_e
    dr_e[i] = sum_o s_e W G_e      ds_e[o] = sum_i r_e W G_e             db_e = sum_b g_e
"""

from __future__ import annotations

from .._linear_form import LinearForm
from .._member_batching import register_vmap

FORM = LinearForm(
    "rank1_linear",
    ("x", "weight", "r", "s"),
    lambda x, weight, r, s: (r.shape[0], x.shape[-2], weight.shape[0]),
)
register_vmap(FORM, shared="weight")
