"""grouped_linear's derivatives, as those of a linear form.

With g = dL/dz:    dx_e = g_e W_e  (summed over e where x is shared)      dW_e = g_e^T x_e      db_e = sum_b g_e
"""

from __future__ import annotations

from .._linear_form import LinearForm

FORM = LinearForm("grouped_linear", ("x", "weight"), lambda x, weight: (weight.shape[0], x.shape[-2], weight.shape[1]))
