"""Which modules of torch.nn are activations that a linear layer computes with its product."""

from __future__ import annotations

from torch import nn

MODULES = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def fused_name(module: nn.Module) -> str | None:
    """The activation's name, or None."""
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return next((name for name, kind in MODULES.items() if type(module) is kind), None)
