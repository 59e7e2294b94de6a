"""EnsembleBatchNorm1d, 2d and 3d, EnsembleLayerNorm: torch.nn's normalizations, one per member."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import reject
from ._layout import as_given, layout_repr, members_first, one_layout, one_member, positive


class _EnsembleBatchNorm(nn.Module):
    PLAIN: type[nn.Module]  # torch.nn's layer of one member

    def __init__(
        self,
        num_features: int,
        num_members: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        positive(layer, num_features=num_features, num_members=num_members)
        one_layout(layer, batch_first, tiled)
        self.num_features, self.num_members = num_features, num_members
        self.eps, self.momentum, self.affine, self.track_running_stats = eps, momentum, affine, track_running_stats
        self.batch_first, self.tiled = batch_first, tiled
        sizes = num_members, num_features
        for name, present in (("weight", affine), ("bias", affine and bias)):
            value = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, value)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(sizes, device=device, dtype=dtype) if track_running_stats else None)
        batches = torch.zeros(num_members, device=device, dtype=torch.long) if track_running_stats else None
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_batchnorm(cls, norm: nn.Module, num_members: int, **options: object) -> _EnsembleBatchNorm:
        """Members that all have the given layer's parameters and running statistics (copied).

        Args:
            norm: its options, dtype, device, `requires_grad` and mode are kept.
            options: `batch_first`, `tiled`.
        """
        if not isinstance(norm, cls.PLAIN):
            expected = f"a torch.nn.{cls.PLAIN.__name__}"
            reject(f"{cls.__name__}.from_batchnorm", "norm", expected, type(norm).__name__, TypeError)
        place = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
        how = norm.eps, norm.momentum, norm.affine, norm.running_mean is not None
        bias = norm.bias is not None
        layer = cls(norm.num_features, num_members, *how, bias=bias, **options, device=place.device, dtype=place.dtype)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if getattr(norm, name) is not None:
                getattr(layer, name).copy_(getattr(norm, name))
        layer.track_running_stats = norm.track_running_stats  # may have been switched off since
        return _with_parameters(layer, norm)

    @torch.no_grad()
    def _plain(self, member: int) -> nn.Module:
        """torch.nn's layer of one member."""
        place = next((t for t in (self.weight, self.running_mean) if t is not None), torch.empty(0))
        how = self.eps, self.momentum, self.affine, self.running_mean is not None
        norm = self.PLAIN(self.num_features, *how, device=place.device, dtype=place.dtype)
        norm.track_running_stats = self.track_running_stats
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            value = getattr(self, name)
            if value is not None:
                getattr(norm, name).copy_(value[member])
        if self.affine and self.bias is None:
            norm.register_parameter("bias", None)
        return norm.train(self.training)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layer = type(self).__name__
        if not isinstance(input, Tensor):
            reject(layer, "input", "a torch.Tensor", input, TypeError)
        features = self._features(input.dim() - (2 if self.tiled or member is not None else 3))
        if member is not None:
            members = one_member(layer, input, member, self.num_members, features)
            x = input.unsqueeze(0)
        else:
            members = slice(None)
            x = members_first(layer, input, self.num_members, self.batch_first, features, self.tiled)
            if x.dim() == 2 + features.count(","):
                x = x.expand(self.num_members, *x.shape)
        if x.shape[2] != self.num_features:
            reject(layer, "input", f"of C={self.num_features} features", input)
        y = self._normalize(x, members)
        return y.squeeze(0) if member is not None else as_given(y, self.batch_first, self.tiled)

    def _features(self, axes: int) -> str:
        """What the axes after B are, of which there are one more than `axes` if input is per member."""
        raise NotImplementedError

    def _normalize(self, x: Tensor, members: slice) -> Tensor:
        """x [n, B, C, ...] of the n members; the rules of training and statistics are torch.nn's."""
        batch_statistics = self.training or self.running_mean is None
        if batch_statistics and x[0].numel() == self.num_features:
            reject(type(self).__name__, "input", "more than one value per feature and member", x)
        factors = [0.0 if self.momentum is None else self.momentum] * len(x)
        if self.training and self.track_running_stats:
            tracked = self.num_batches_tracked[members]
            tracked.add_(1)
            if self.momentum is None:
                factors = [1 / n for n in tracked.tolist()]
        tracks = not self.training or self.track_running_stats
        state = [
            None if t is None else t[members]
            for t in (*((self.running_mean, self.running_var) if tracks else (None, None)), self.weight, self.bias)
        ]
        # As one layer of n C features: where these are one axis in memory, and where there are few values to copy.
        # Images would be copied, and lose their memory format.
        one_axis = len(x) == 1 or x.stride(0) == x.shape[2] * x.stride(2)
        contiguous = all(t is None or t.is_contiguous() for t in state)
        if (one_axis or x.dim() == 3) and len(set(factors)) == 1 and contiguous:
            flat = [None if t is None else t.view(-1) for t in state]
            y = F.batch_norm(x.transpose(0, 1).flatten(1, 2), *flat, batch_statistics, factors[0], self.eps)
            return y.unflatten(1, (len(x), self.num_features)).transpose(0, 1)
        states = zip(*(repeat(None) if t is None else t for t in state))
        return torch.stack(
            [F.batch_norm(x_e, *s, batch_statistics, f, self.eps) for x_e, s, f in zip(x.unbind(0), states, factors)]
        )

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_members={self.num_members}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            + "bias=False, " * (self.affine and self.bias is None)
            + f"track_running_stats={self.track_running_stats}"
            + layout_repr(self.batch_first, self.tiled)
        )


class EnsembleBatchNorm1d(_EnsembleBatchNorm):
    """One `torch.nn.BatchNorm1d` per member: its own statistics, running statistics and affine parameters.

    Args:
        num_features, eps, momentum, affine, track_running_stats, bias, device, dtype: as in `torch.nn.BatchNorm1d`.
        num_members: E.
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.
        tiled: inputs and outputs are `[E*B, ...]`, all rows of the first member first; then there is no shared input.

    Parameters `weight`, `bias` and buffers `running_mean`, `running_var` `[E, C]`, `num_batches_tracked` `[E]`.

    `forward(input, member=None)`: `input` is `[B, C]` (the same rows for every member), or per member `[E, B, C]` or
    `[E, B, C, L]`: three axes always are a member's rows.  With `member=e` that member alone runs, and alone updates
    its running statistics, on `[B, C]` or `[B, C, L]`.

    Example:
        >>> norm = EnsembleBatchNorm1d(64, num_members=5)
        >>> norm(torch.randn(5, 32, 64)).shape, norm.running_mean.shape
        (torch.Size([5, 32, 64]), torch.Size([5, 64]))
    """

    PLAIN = nn.BatchNorm1d

    def _features(self, axes: int) -> str:
        return "C, L" if axes == 1 else "C"


class EnsembleBatchNorm2d(_EnsembleBatchNorm):
    """One `torch.nn.BatchNorm2d` per member, as :class:`EnsembleBatchNorm1d`, for images.

    `forward(input, member=None)`: `input` is `[B, C, H, W]` (the same images for every member) or per member; with
    `member=e` that member alone runs, on `[B, C, H, W]`.  channels_last images stay so.

    Example:
        >>> norm = EnsembleBatchNorm2d(16, num_members=5)
        >>> norm(torch.randn(5, 32, 16, 28, 28)).shape
        torch.Size([5, 32, 16, 28, 28])
    """

    PLAIN = nn.BatchNorm2d

    def _features(self, axes: int) -> str:
        return "C, H, W"


class EnsembleBatchNorm3d(_EnsembleBatchNorm):
    """One `torch.nn.BatchNorm3d` per member, as :class:`EnsembleBatchNorm2d`, for volumes `[B, C, D, H, W]`.

    Example:
        >>> norm = EnsembleBatchNorm3d(4, num_members=5)
        >>> norm(torch.randn(5, 8, 4, 6, 6, 6)).shape
        torch.Size([5, 8, 4, 6, 6, 6])
    """

    PLAIN = nn.BatchNorm3d

    def _features(self, axes: int) -> str:
        return "C, D, H, W"


class EnsembleLayerNorm(nn.Module):
    """One `torch.nn.LayerNorm` per member: affine parameters of its own.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `torch.nn.LayerNorm`.
        num_members: E.
        extra_dims: how many axes lie between B and `normalized_shape`: 1 for `[B, T, D]` of T tokens.  It is told
            because sizes cannot tell tokens from members; with `tiled` it need not be.
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.
        tiled: inputs and outputs are `[E*B, ...]`, all rows of the first member first; then there is no shared input.

    Parameters `weight` and `bias` `[E, *normalized_shape]`.

    `forward(input, member=None)`: `input` is `[B, *, *normalized_shape]` (the same rows for every member) or per
    member; with `member=e` that member alone runs.

    Example:
        >>> norm = EnsembleLayerNorm(64, num_members=5)
        >>> norm(torch.randn(32, 64)).shape
        torch.Size([5, 32, 64])
        >>> EnsembleLayerNorm(64, num_members=5, extra_dims=1)(torch.randn(5, 32, 10, 64)).shape
        torch.Size([5, 32, 10, 64])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        num_members: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        extra_dims: int = 0,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = "EnsembleLayerNorm"
        shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
        if not shape:
            reject(layer, "normalized_shape", "at least one size", repr(normalized_shape))
        for size in shape:
            positive(layer, normalized_shape=size)
        positive(layer, num_members=num_members)
        if isinstance(extra_dims, bool) or not isinstance(extra_dims, int):
            reject(layer, "extra_dims", "an int", repr(extra_dims), TypeError)
        if extra_dims < 0:
            reject(layer, "extra_dims", "at least 0", repr(extra_dims))
        one_layout(layer, batch_first, tiled)
        self.normalized_shape, self.num_members = shape, num_members
        self.eps, self.elementwise_affine, self.extra_dims = eps, elementwise_affine, extra_dims
        self.batch_first, self.tiled = batch_first, tiled
        for name, present in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(num_members, *shape, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_layernorm(cls, norm: nn.LayerNorm, num_members: int, **options: object) -> EnsembleLayerNorm:
        """Members that all have the given layer's parameters (copied).

        Args:
            norm: its options, dtype, device, `requires_grad` and mode are kept.
            options: `extra_dims`, `batch_first`, `tiled`.
        """
        if not isinstance(norm, nn.LayerNorm):
            expected = "a torch.nn.LayerNorm"
            reject("EnsembleLayerNorm.from_layernorm", "norm", expected, type(norm).__name__, TypeError)
        place = torch.empty(0) if norm.weight is None else norm.weight
        how = norm.eps, norm.elementwise_affine, norm.bias is not None
        layer = cls(norm.normalized_shape, num_members, *how, **options, device=place.device, dtype=place.dtype)
        return _with_parameters(layer, norm)

    @torch.no_grad()
    def _plain(self, member: int) -> nn.LayerNorm:
        """torch.nn's layer of one member."""
        norm = nn.LayerNorm(self.normalized_shape, self.eps, self.elementwise_affine, device="meta")
        for name in ("weight", "bias"):
            value = getattr(self, name)
            own = value if value is None else nn.Parameter(value[member].clone(), value.requires_grad)
            norm.register_parameter(name, own)
        return norm.train(self.training)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layer, shape, between = "EnsembleLayerNorm", self.normalized_shape, self.extra_dims
        if self.tiled and member is None and isinstance(input, Tensor):
            between = max(between, input.dim() - 1 - len(shape))
        features = ", ".join([f"T{n + 1}" for n in range(between)] + [str(size) for size in shape])
        if member is not None:
            one_member(layer, input, member, self.num_members, features)
            x = members_first(layer, input, 1, False, features)
        else:
            x = members_first(layer, input, self.num_members, self.batch_first, features, self.tiled)
        if x.shape[-len(shape) :] != shape:
            reject(layer, "input", f"of {list(shape)} in the last axes", input)
        weight, bias = self.weight, self.bias
        if member is not None:
            weight, bias = (None if t is None else t[member] for t in (weight, bias))
            return F.layer_norm(x, shape, weight, bias, self.eps)
        own = x.dim() > 2 + features.count(",")
        if weight is None:
            y = F.layer_norm(x, shape, None, None, self.eps)
            y = y if own else y.expand(self.num_members, *y.shape).contiguous()
            return as_given(y, self.batch_first, self.tiled)
        # Member by member, which PyTorch's operation does in one pass; the results lie in the order of the layout.
        parts = zip(x if own else repeat(x), weight.unbind(0), repeat(None) if bias is None else bias.unbind(0))
        y = [F.layer_norm(part, shape, w, b, self.eps) for part, w, b in parts]
        return torch.cat(y) if self.tiled else torch.stack(y, int(self.batch_first))

    def extra_repr(self) -> str:
        return (
            f"normalized_shape={self.normalized_shape}, num_members={self.num_members}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}"
            + ", bias=False" * (self.elementwise_affine and self.bias is None)
            + (f", extra_dims={self.extra_dims}" if self.extra_dims else "")
            + layout_repr(self.batch_first, self.tiled)
        )


def _with_parameters(layer: nn.Module, plain: nn.Module) -> nn.Module:
    """`layer` with copies of the plain layer's weight and bias for every member, and its mode."""
    for name in ("weight", "bias"):
        value = getattr(plain, name)
        if value is not None:
            copies = value.detach().expand(layer.num_members, *value.shape).clone()
            setattr(layer, name, nn.Parameter(copies, value.requires_grad))
    return layer.train(plain.training)
