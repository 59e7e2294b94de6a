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
from torch._C import _functorch
from torch.autograd import forward_ad

from .. import _dispatch, _env

LIBRARY = torch.library.Library("effens_kernels", "DEF")
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


def register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define `schema`; `run` is its implementation on every device, `fake` its shape rule."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effens_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.effens_kernels, name).default


def register_derivative(op: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> None:
    """`torch.library.register_autograd`, but for torch.func's transforms too (torch 2.13's refuses them).

    A transform dispatches the op once per level; each time this records the derivative of that level alone.
    """

    class Derivative(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments):
            *inputs, keys = arguments
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():  # the levels below record theirs
                output = op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    def run(keys, *inputs):
        # Forward-mode tangents need a rule too: there is none, which Function says rather than to drop them.
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)) or forward_ad._current_level >= 0:
            before = _functorch.get_single_level_autograd_function_allowed()
            _functorch.set_single_level_autograd_function_allowed(True)
            try:
                return Derivative.apply(*inputs, keys)
            finally:
                _functorch.set_single_level_autograd_function_allowed(before)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    LIBRARY.impl(op._schema.name.removeprefix("effens_kernels::"), run, "Autograd", with_keyset=True)


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """True where nothing needs to see the op, so that the short route is exact."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    return _PLAIN_TYPES.issuperset(map(type, tensors)) and not tensors[0].is_meta


def takes_cpu_engine(op: str, requested: str | None, x: Tensor, *others: Tensor | None) -> bool:
    """True where the short route on the CPU engine is exact; arguments that are wrong may pass."""
    return (
        x is not None
        and is_plain_eager(x, *others)
        and x.is_cpu
        and (requested is None or type(requested) is str)
        and _dispatch.selects("cpu", op, x.dtype, requested)
    )


def plain_backend(op: str, requested: str | None, x: Tensor, *others: Tensor | None) -> str | None:
    """ "cpu" or "cuda", where the short route on its kernels is exact; arguments that are wrong may pass."""
    if x is None or not is_plain_eager(x, *others) or not (requested is None or type(requested) is str):
        return None
    for backend in ("cpu", "cuda"):
        if x.device.type == _dispatch.takes_device(backend) and _dispatch.selects(backend, op, x.dtype, requested):
            return backend
    return None


def takes_torch(op: str, requested: str | None, x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Where `takes_cpu_engine`: whether dispatch takes torch's composition all the same, or the arguments are at fault.

    `weight` is [..., O, I].
    """
    if requested is not None or _env.BACKEND is not None:
        return False
    if weight is None or x.dim() < 2 or weight.dim() < 2:
        return True
    training = needs_grad(x, weight, *others)
    return _dispatch.has_few_rows(op, x.dtype, x.shape[-2], weight.shape[-1], weight.shape[-2], training)


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def one_by_one(op: Callable, size: int, in_dims, tensors, rest) -> list[Tensor]:
    """A vmap rule's last resort: the op on each instance.

    Results are stacked, but for those that are empty in place of nothing.
    """
    instances = [
        op(*(t if d is None else t.select(d, v) for t, d in zip(tensors, in_dims)), *rest) for v in range(size)
    ]
    instances = [(found,) if isinstance(found, Tensor) else found for found in instances]
    return [torch.stack(parts) if parts[0].dim() > 1 else parts[0] for parts in zip(*instances)]
