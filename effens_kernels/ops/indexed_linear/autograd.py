"""indexed_linear's derivatives, as those of a linear form.

With p(g), e(g) the input and the weight of group g, and g_g = dL/dz_g:

    dx_p = sum over p(g) = p of g_g W_e(g)      dW_e = sum over e(g) = e of g_g^T x_p(g)      db_e likewise of g_g
"""

from __future__ import annotations

from .._linear_form import LinearForm

FORM = LinearForm(
    "indexed_linear",
    ("x", "weight"),
    lambda x, weight, x_index, weight_index: (x_index.shape[0], x.shape[1], weight.shape[1]),
    ("x_index", "weight_index"),
)
