"""BatchEnsembleMultiheadAttention: `torch.nn.MultiheadAttention` of one set of weights, with scales of each member."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import rank1_linear
from ..ops._checks import reject
from ._layout import one_member, positive
from .batchensemble import BatchEnsembleLinear, check_scales, draw_scales, folded, scales_repr


class Projection(NamedTuple):
    """One product: what it is of, by names of parameters, and its part of the packed outputs of q, k and v."""

    weight: str
    r: str
    outputs: slice


class BatchEnsembleMultiheadAttention(nn.Module):
    r"""A `torch.nn.MultiheadAttention` per member, whose projections are BatchEnsemble layers of shared weights.

    .. math:: q_e, k_e, v_e = \mathrm{split}\bigl(((x_e \circ r_e) W^\top) \circ s_e + b_e\bigr)

    and the same for the projection of the heads' outputs (Wen et al. 2020, equation 5); attention is between the rows
    of one member.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `torch.nn.MultiheadAttention`; `batch_first` is about tokens, `[B, L, D]`.
        num_members: E.
        init, std: of the scales, as in :class:`BatchEnsembleLinear`.

    Parameters are those of `torch.nn.MultiheadAttention` by name, weights shared and biases per member (`in_proj_bias`
    `[E, 3D]`, `bias_k` and `bias_v` `[E, 1, 1, D]`), and the scales: `in_proj_s` `[E, 3D]`, `in_proj_r` `[E, D]` (or,
    with `kdim` or `vdim`, `q_proj_r`, `k_proj_r`, `v_proj_r`), `out_proj.r` and `out_proj.s` `[E, D]`.

    `forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False, member=None)`: as in torch.nn, for the rows of all members, those of the first first, in place of
    the batch: `[E*B, L, D]` with `batch_first`, else `[L, E*B, D]`; `key_padding_mask` `[E*B, S]`, `attn_mask`
    `[L, S]` or `[E*B*num_heads, L, S]`.  With `member=e`, B rows of that member alone.

    Example:
        >>> attention = BatchEnsembleMultiheadAttention(64, 4, num_members=5, batch_first=True)
        >>> x = torch.randn(5 * 8, 10, 64)
        >>> y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([40, 10, 64]), torch.Size([40, 10, 10]))
    """

    # torch.nn's transformer layers look here whether a kernel of theirs may read the parameters in its stead.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_members: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        init: str = "normal",
        std: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": self.kdim, "vdim": self.vdim}
        positive(layer, **sizes, num_members=num_members)
        if embed_dim % num_heads:
            reject(layer, "embed_dim", f"a multiple of num_heads={num_heads}", repr(embed_dim))
        check_scales(layer, init, std)
        self.embed_dim, self.num_heads, self.num_members = embed_dim, num_heads, num_members
        self.head_dim, self.dropout = embed_dim // num_heads, dropout
        self.add_zero_attn, self.batch_first, self.init, self.std = add_zero_attn, batch_first, init, std

        def parameter(name: str, *shape: int, present: bool = True) -> None:
            value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, value)

        packed = self.kdim == self.vdim == embed_dim
        parameter("in_proj_weight", 3 * embed_dim, embed_dim, present=packed)
        parameter("in_proj_r", num_members, embed_dim, present=packed)
        for name, features in (("q", embed_dim), ("k", self.kdim), ("v", self.vdim)):
            parameter(f"{name}_proj_weight", embed_dim, features, present=not packed)
            parameter(f"{name}_proj_r", num_members, features, present=not packed)
        parameter("in_proj_s", num_members, 3 * embed_dim)
        parameter("in_proj_bias", num_members, 3 * embed_dim, present=bias)
        for name in ("bias_k", "bias_v"):
            parameter(name, num_members, 1, 1, embed_dim, present=add_bias_kv)
        place = {"device": device, "dtype": dtype}
        self.out_proj = BatchEnsembleLinear(embed_dim, embed_dim, num_members, bias, init=init, std=std, **place)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn draws them, then the scales."""
        self.out_proj.reset_parameters()
        self._reset_own_parameters()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        for name, value in self._parameters.items():
            if value is None:
                continue
            if name.endswith("_weight"):
                nn.init.xavier_uniform_(value)
            elif name.endswith(("_r", "_s")):
                draw_scales(self.init, self.std, value)
            elif name == "in_proj_bias":
                value.zero_()
            else:
                for own in value:
                    nn.init.xavier_normal_(own)
        if self.out_proj.bias is not None:
            self.out_proj.bias.zero_()

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, num_members: int, **options: object
    ) -> BatchEnsembleMultiheadAttention:
        """Members of the given layer's weights and biases (copied), with scales of their own.

        Args:
            attention: its options, dtype, device, `requires_grad` and mode are kept.
            options: `init`, `std`.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            expected, got = "a torch.nn.MultiheadAttention", type(attention).__name__
            reject(f"{cls.__name__}.from_attention", "attention", expected, got, TypeError)
        weight = attention.out_proj.weight
        sizes = attention.embed_dim, attention.num_heads, num_members
        layer = cls(*sizes, *cls._options(attention), **options, device=weight.device, dtype=weight.dtype)
        for name, value in attention._parameters.items():
            if value is not None:
                copies = value.detach().clone()
                if not name.endswith("_weight"):
                    copies = copies.expand(num_members, *copies.shape).clone()
                setattr(layer, name, nn.Parameter(copies, value.requires_grad))
        layer.out_proj._take(attention.out_proj)
        return layer.train(attention.training)

    @staticmethod
    def _options(layer: nn.Module) -> tuple[object, ...]:
        """Of a layer of torch.nn or of ours, in the order of the constructors."""
        biases = layer.in_proj_bias is not None, layer.bias_k is not None
        return layer.dropout, *biases, layer.add_zero_attn, layer.kdim, layer.vdim, layer.batch_first

    @torch.no_grad()
    def _plain(self, member: int) -> nn.MultiheadAttention:
        """torch.nn's layer of one member."""
        plain = nn.MultiheadAttention(self.embed_dim, self.num_heads, *self._options(self), device="meta")
        for weight, r, outputs in self._projections(apart=self.in_proj_weight is None):
            own = getattr(self, r)[member : member + 1], self.in_proj_s[member : member + 1, outputs]
            value = folded(getattr(self, weight), own[1], own[0])[0]
            setattr(plain, weight, nn.Parameter(value, getattr(self, weight).requires_grad))
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            value = getattr(self, name)
            if value is not None:
                setattr(plain, name, nn.Parameter(value[member].clone(), value.requires_grad))
        self.out_proj._filled(plain.out_proj, member)
        return plain.train(self.training)

    # ------------------------------------------------------------------------------------------------- as a layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        member: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        layer = type(self).__name__
        one = slice(None) if member is None else one_member(layer, None, member, self.num_members)
        inputs = [self._tokens(*named, member) for named in (("query", query), ("key", key), ("value", value))]
        if inputs[1].shape[:2] != inputs[2].shape[:2] or len(inputs[0]) != len(inputs[1]):
            reject(layer, "key", "of as many rows as query, and of as many tokens as value", key)
        if query is key:  # one product for what is one input
            inputs[1] = inputs[0]
        if key is value:
            inputs[2] = inputs[1]
        (rows, queries, _), keys = inputs[0].shape, inputs[1].shape[1]
        if is_causal and attn_mask is None:
            reject(layer, "attn_mask", "the causal mask with is_causal=True", "None")
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, (rows, queries, keys), query.dtype)

        q, k, v = self._projected(inputs, one)
        k, v, added = self._with_added_tokens(k, v, one)
        if mask is not None and added:
            mask = F.pad(mask, (0, added))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = weights.to(v.dtype) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2).reshape(len(self.out_proj.r[one]), -1, self.embed_dim)
        bias = None if self.out_proj.bias is None else self.out_proj.bias[one]
        y = rank1_linear(y, self.out_proj.weight, self.out_proj.r[one], self.out_proj.s[one], bias)
        y = y.view(rows, queries, self.embed_dim)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _tokens(self, name: str, x: Tensor, member: int | None) -> Tensor:
        """[E*B, L, D], whatever comes first."""
        layer, features = type(self).__name__, {"key": self.kdim, "value": self.vdim}.get(name, self.embed_dim)
        if not isinstance(x, Tensor):
            reject(layer, name, "a torch.Tensor", x, TypeError)
        rows = "B" if member is not None else "E*B"
        layout = f"[{rows}, L, {features}]" if self.batch_first else f"[L, {rows}, {features}]"
        if x.is_nested or x.dim() != 3 or x.shape[2] != features:
            got = "a nested tensor" if x.is_nested else x
            reject(layer, name, f"{layout} with E={self.num_members}", got)
        x = x if self.batch_first else x.transpose(0, 1)
        if member is None and len(x) % self.num_members:
            reject(layer, name, f"{layout} with E={self.num_members}", x if self.batch_first else x.transpose(0, 1))
        return x

    def _projections(self, apart: bool) -> list[Projection]:
        """Those of q, k and v, or of them together."""
        if not apart:
            return [Projection("in_proj_weight", "in_proj_r", slice(None))]
        parts = [slice(n * self.embed_dim, (n + 1) * self.embed_dim) for n in range(3)]
        if self.in_proj_weight is not None:
            return [Projection("in_proj_weight", "in_proj_r", part) for part in parts]
        return [Projection(f"{n}_proj_weight", f"{n}_proj_r", part) for n, part in zip("qkv", parts)]

    def _projected(self, inputs: list[Tensor], one: slice) -> list[Tensor]:
        """q, k and v [E*B, heads, L, head_dim]."""
        apart = self.in_proj_weight is None or not inputs[0] is inputs[1] is inputs[2]
        found: list[Tensor] = []
        for x, (name, scale, outputs) in zip(inputs, self._projections(apart)):
            weight, r = getattr(self, name), getattr(self, scale)[one]
            weight = weight[outputs] if name == "in_proj_weight" else weight
            bias = None if self.in_proj_bias is None else self.in_proj_bias[one, outputs]
            tokens = x.shape[:2]
            x = x.reshape(len(r), tokens.numel() // len(r), x.shape[2])
            y = rank1_linear(x, weight, r, self.in_proj_s[one, outputs], bias)
            y = y.view(*tokens, 1 if apart else 3, self.num_heads, self.head_dim)
            found += [part.transpose(1, 2) for part in y.unbind(2)]
        return found

    def _with_added_tokens(self, k: Tensor, v: Tensor, one: slice) -> tuple[Tensor, Tensor, int]:
        """Keys and values that learned ones, or zeros, are appended to."""
        added, sizes = 0, (len(k), self.num_heads, 1, self.head_dim)
        if self.bias_k is not None:
            members = len(self.bias_k[one])
            own = [
                t[one].expand(members, len(k) // members, 1, self.embed_dim).reshape(len(k), 1, *sizes[1::2])
                for t in (self.bias_k, self.bias_v)
            ]
            k, v = (torch.cat([t, bias.transpose(1, 2).to(t.dtype)], 2) for t, bias in zip((k, v), own))
            added += 1
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(sizes)], 2) for t in (k, v))
            added += 1
        return k, v, added

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, sizes: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as numbers to add to scores [E*B, heads, L, S]."""
        layer, (rows, queries, keys) = type(self).__name__, sizes
        found = None
        if attention is not None:
            found = _added("attn_mask", attention, dtype)
            if found.shape == (rows * self.num_heads, queries, keys):
                found = found.view(rows, self.num_heads, queries, keys)
            elif found.shape != (queries, keys):
                expected = f"[L={queries}, S={keys}] or [{rows * self.num_heads}, L={queries}, S={keys}]"
                reject(layer, "attn_mask", expected, attention)
        if padding is not None:
            if padding.shape != (rows, keys):
                reject(layer, "key_padding_mask", f"[{rows}, S={keys}]", padding)
            own = _added("key_padding_mask", padding, dtype).view(rows, 1, 1, keys)
            found = own if found is None else found + own
        return found

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_members={self.num_members}, "
            f"{scales_repr(self.init, self.std)}" + ", batch_first=True" * bool(self.batch_first)
        )


def _added(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is to be added to scores: -inf where a mask of truth values hides a key."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        expected = "of truth values or floating-point numbers"
        reject("BatchEnsembleMultiheadAttention", name, expected, mask, TypeError)
    return mask
