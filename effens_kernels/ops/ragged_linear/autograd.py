"""ragged_linear's derivatives, as those of a linear form.

With g = dL/dz, and rows n of member e:    dx_n = g_n W_e      dW_e = g_e^T x_e      db_e = sum of g_n over its rows
"""

from __future__ import annotations

from .._linear_form import LinearForm

FORM = LinearForm(
    "ragged_linear",
    ("x", "weight"),
    lambda x, weight, offsets: (x.shape[0], weight.shape[1]),
    ("offsets",),
)
