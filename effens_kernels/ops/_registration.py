"""How an op becomes visible to PyTorch: one schema per direction, one fake, registered autograd and vmap rules.

Two routes run the same `<op>_fwd` / `<op>_bwd`:

* plain eager tensors go straight to a ctx-style `torch.autograd.Function`, the cheapest route per call;
* everything that must *see* the op (torch.compile, torch.export, torch.func, dispatch modes, tensor subclasses,
  meta tensors) goes through `torch.ops.effens_kernels.<op>_fwd`, which carries the registered rules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("effens_kernels", "DEF")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define `schema`; `run` is its implementation on every device, `fake` its shape rule."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effens_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.effens_kernels, name).default


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """True where nothing needs to see the op, so that the short route is exact."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    return all(t is None or (type(t) in _PLAIN_TYPES and not t.is_meta) for t in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
