"""mixture_linear on the Triton kernels."""

from __future__ import annotations

from ..grouped_linear import triton as linear
from ..mix_templates import triton as mixing
from . import routes

fwd, bwd = routes.over(mixing, linear)
