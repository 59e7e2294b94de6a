"""Ensemble: a converted model as a module that maps [B, ...] to [E, B, ...]."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..ops._checks import reject
from ._summary import Summary
from ._surgery import is_ours, replaced


class Ensemble(nn.Module):
    """A model whose layers hold all members, as :func:`effens_kernels.convert` makes it.

    `forward(*inputs, per_member=False)` gives every member the same rows `[B, ...]`, or with `per_member=True` rows of
    its own, `[E, B, ...]`.  Tensors among the inputs are rows; everything else is passed on as it is.  Every tensor
    of the model's result comes back as `[E, B, ...]`, in tuples, lists and dicts as the model arranges them.

    `member(e)` is member e alone, as a model of the original classes.

    Attributes:
        model: the converted model, which maps `[E*B, ...]` to `[E*B, ...]`, the rows of the first member first.
        num_members: E.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
        >>> ensemble = ek.convert(model, "mixture", num_members=3, budget="1x")
        >>> x = torch.randn(32, 16)
        >>> torch.allclose(ensemble(x)[1], ensemble.member(1)(x), atol=1e-5)
        True
        >>> ensemble(torch.randn(3, 32, 16), per_member=True).shape
        torch.Size([3, 32, 16])
    """

    def __init__(self, model: nn.Module, num_members: int) -> None:
        super().__init__()
        self.model, self.num_members = model, num_members
        self.training = model.training

    def forward(self, *inputs: object, per_member: bool = False, **named: object) -> object:
        rows: list[int] = []

        def tile(t: Tensor) -> Tensor:
            if t.dim() < (2 if per_member else 1):
                return t
            if per_member and t.shape[0] != self.num_members:
                layout = f"[E={self.num_members}, B, ...] with per_member=True"
                reject(type(self).__name__, "input", layout, t)
            t = t if per_member else t.expand(self.num_members, *t.shape)
            rows.append(t.shape[1])
            return t.flatten(0, 1)

        def split(t: Tensor) -> Tensor:
            if not rows or t.dim() == 0 or t.shape[0] != self.num_members * rows[0]:
                expected = "[E*B, ...], one row for each of the input's"
                reject(type(self).__name__, "the model's result", expected, t)
            return t.unflatten(0, (self.num_members, rows[0]))

        result = self.model(*(_mapped(tile, value) for value in inputs), **_mapped(tile, named))
        return _mapped(split, result)

    @torch.no_grad()
    def member(self, member: int) -> nn.Module:
        """Member e (from the end, if negative) as a model of the original classes, with weights of its own."""
        layer, count = type(self).__name__, self.num_members
        if isinstance(member, bool) or not isinstance(member, int):
            reject(layer, "member", "an int", repr(member), TypeError)
        if not -count <= member < count:
            reject(layer, "member", f"in [-{count}, {count})", repr(member), IndexError)
        return self._member(member % count)

    def _member(self, member: int) -> nn.Module:
        layers = [module for module in self.model.modules() if is_ours(module)]
        return replaced(self.model, {module: module._plain(member) for module in layers})

    def _optimizer_groups(self, free: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
        """All parameters that are trained, those of `free` without weight decay."""
        spared = {id(p) for p in free}
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
        ]

    def summary(self) -> Summary:
        """What the members share and what each has of its own, in numbers of parameters; prints as a table."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}"


def _mapped(function: Callable[[Tensor], Tensor], value: object) -> object:
    """`function` of every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(function, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(function, part) for name, part in value.items()}
    return value
