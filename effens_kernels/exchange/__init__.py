"""Exchange with other libraries: their layers, models and states; none of them is needed or imported."""

from . import tabm, torch_uncertainty

__all__ = ["tabm", "torch_uncertainty"]
