"""mixture_linear on the CUDA C++ kernels of the compiled extension."""

from __future__ import annotations

from ..grouped_linear import cuda as linear
from ..mix_templates import cuda as mixing
from . import routes

fwd, bwd = routes.over(mixing, linear)
