"""mixture_linear on the C++ CPU engine of the compiled extension."""

from __future__ import annotations

from ..grouped_linear import native as linear
from ..mix_templates import native as mixing
from . import routes

fwd, bwd = routes.over(mixing, linear)
