"""EnsembleGroupNorm: one `torch.nn.GroupNorm` per member."""

from __future__ import annotations

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import reject
from ._layout import one_member, positive
from .norm import _with_parameters


class EnsembleGroupNorm(nn.Module):
    """One `torch.nn.GroupNorm` per member: affine parameters of its own.

    Args:
        num_groups, num_channels, eps, affine, bias, device, dtype: as in `torch.nn.GroupNorm`.
        num_members: E.

    Parameters `weight` and `bias` `[E, C]`.

    `forward(input, member=None)`: `[E*B, C, ...]`, all rows of the first member first; with `member=e` that member
    alone runs, on `[B, C, ...]`.

    Example:
        >>> norm = EnsembleGroupNorm(4, 16, num_members=5)
        >>> norm(torch.randn(5 * 32, 16, 28, 28)).shape
        torch.Size([160, 16, 28, 28])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        num_members: int,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = "EnsembleGroupNorm"
        positive(layer, num_groups=num_groups, num_channels=num_channels, num_members=num_members)
        if num_channels % num_groups:
            reject(layer, "num_channels", f"a multiple of num_groups={num_groups}", repr(num_channels))
        self.num_groups, self.num_channels, self.num_members = num_groups, num_channels, num_members
        self.eps, self.affine = eps, affine
        for name, present in (("weight", affine), ("bias", affine and bias)):
            sizes = num_members, num_channels
            value = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_groupnorm(cls, norm: nn.GroupNorm, num_members: int) -> EnsembleGroupNorm:
        """Members that all have the given layer's parameters (copied); its options and mode are kept."""
        if not isinstance(norm, nn.GroupNorm):
            expected = "a torch.nn.GroupNorm"
            reject("EnsembleGroupNorm.from_groupnorm", "norm", expected, type(norm).__name__, TypeError)
        place = torch.empty(0) if norm.weight is None else norm.weight
        how = norm.eps, norm.affine, norm.bias is not None
        sizes = norm.num_groups, norm.num_channels, num_members
        return _with_parameters(cls(*sizes, *how, device=place.device, dtype=place.dtype), norm)

    @torch.no_grad()
    def _plain(self, member: int) -> nn.GroupNorm:
        """torch.nn's layer of one member."""
        norm = nn.GroupNorm(self.num_groups, self.num_channels, self.eps, self.affine, device="meta")
        for name in ("weight", "bias"):
            value = getattr(self, name)
            own = value if value is None else nn.Parameter(value[member].clone(), value.requires_grad)
            norm.register_parameter(name, own)
        return norm.train(self.training)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layer = "EnsembleGroupNorm"
        if not isinstance(input, Tensor):
            reject(layer, "input", "a torch.Tensor", input, TypeError)
        members = 1 if member is not None else self.num_members
        if input.dim() < 2 or input.shape[1] != self.num_channels or input.shape[0] % members:
            rows = "B" if member is not None else "E*B"
            reject(layer, "input", f"[{rows}, C={self.num_channels}, ...] with E={self.num_members}", input)
        one = slice(None) if member is None else one_member(layer, None, member, self.num_members)
        affine = zip(*(repeat(None) if t is None else t[one] for t in (self.weight, self.bias)))
        if self.weight is None:
            return F.group_norm(input, self.num_groups, None, None, self.eps)
        # Member by member, which PyTorch's operation does in one pass.
        parts = input.unflatten(0, (members, input.shape[0] // members))
        return torch.cat([F.group_norm(x, self.num_groups, w, b, self.eps) for x, (w, b) in zip(parts, affine)])

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, num_members={self.num_members}, eps={self.eps}, "
            f"affine={self.affine}" + ", bias=False" * (self.affine and self.bias is None)
        )
