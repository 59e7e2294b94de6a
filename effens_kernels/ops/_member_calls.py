"""PyTorch's calls that torch.func.vmap cannot map, or maps slowly, as ops with a rule of their own.

Outside vmap each is PyTorch's own composition, which autograd, torch.compile and torch.export see through.  A mapped
axis V becomes

    member_convolution   one convolution each where weights are mapped, else rows
    member_attention     rows, with one attention for all
    member_recurrent     one call each

and what the rules call is differentiated as such.  A convolution each is faster on CPUs than a grouped one of all
(`_dispatch.rank1_conv_route` has the figures); no GPU has been measured.

`shared_noise` is what dropout multiplies with to be the same for all members, in a vmap whose random numbers differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._registration import LIBRARY


def _define(schema: str, run: Callable, rule: Callable) -> Callable:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    torch.library.register_vmap(f"effens_kernels::{name}", rule, lib=LIBRARY)
    return getattr(torch.ops.effens_kernels, name).default


def _instances(t: Tensor | None, dim: int | None, size: int) -> Sequence[Tensor | None]:
    return (t,) * size if t is None or dim is None else t.unbind(dim)


# --------------------------------------------------------------------------------------------------- convolutions


def _vmap_convolution(info, in_dims, x, weight, bias, *options):
    size = info.batch_size
    x_dim, weight_dim, bias_dim = in_dims[:3]
    if weight_dim is None and bias_dim is None:
        x = x.movedim(x_dim, 0)
        y = convolution(x.flatten(0, 1), weight, bias, *options)
        return y.unflatten(0, x.shape[:2]), 0
    members = (_instances(t, d, size) for t, d in zip((x, weight, bias), in_dims))
    return torch.stack([convolution(*instance, *options) for instance in zip(*members)]), 0  # keeps channels_last


convolution = _define(
    "member_convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor",
    torch.convolution,
    _vmap_convolution,
)


# ------------------------------------------------------------------------------------------------------ attention


def _attention(q, k, v, mask, causal, scale, grouped):
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)


def _vmap_attention(info, in_dims, q, k, v, mask, *options):
    size = info.batch_size
    rank = max(t.dim() - (d is not None) for t, d in zip((q, k, v), in_dims))  # of an instance
    axes = max(rank, 3)

    def whole(t: Tensor, dim: int | None) -> Tensor:
        """[V, ..., heads, rows, features], with all axes that q, k or v has."""
        t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        return t.reshape(t.shape[0], *(1,) * (axes + 1 - t.dim()), *t.shape[1:])

    folded = [whole(t, d) for t, d in zip((q, k, v), in_dims)]
    leading = torch.broadcast_shapes(*(t.shape[:-3] for t in folded))  # V and the batch, without heads
    leading = (size, *leading[1:])
    if mask is not None and (in_dims[3] is not None or mask.dim() > 3):
        mask = whole(mask, in_dims[3])
        mask = _fold(mask.expand(*leading, *mask.shape[-3:]))
    y = attention(*(_fold(t.expand(*leading, *t.shape[-3:])) for t in folded), mask, *options)
    y = y.reshape(*leading, *y.shape[-3:])
    return y if rank > 2 else y.squeeze(1), 0


def _fold(t: Tensor) -> Tensor:
    """Four axes, for which there are kernels: batch, heads, rows, features."""
    return t.flatten(0, -4)


attention = _define(
    "member_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, "
    "bool enable_gqa) -> Tensor",
    _attention,
    _vmap_attention,
)


# ------------------------------------------------------------------------------------------------------ recurrent

RECURRENT = {
    kind: getattr(torch._VF, kind) for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}  # results: of all steps, then the last state(s)


def _recurrent(kind, x, state, weights, *options):
    state = state if kind == "lstm" else state[0]
    return list(RECURRENT[kind](x, state, weights, *options))


def _vmap_recurrent(info, in_dims, kind, x, state, weights, *options):
    _, _, dropout, training = options[:4]
    if info.randomness == "same" and dropout > 0 and training:
        raise RuntimeError(f"{kind} cannot drop the same for all members; use randomness='different'")
    size = info.batch_size
    states = zip(*(_instances(t, d, size) for t, d in zip(state, in_dims[2])))
    members = zip(*(_instances(t, d, size) for t, d in zip(weights, in_dims[3])))
    results = [
        recurrent(kind, x_e, list(state_e), list(weights_e), *options)
        for x_e, state_e, weights_e in zip(_instances(x, in_dims[1], size), states, members)
    ]
    return [torch.stack(parts) for parts in zip(*results)], [0] * len(results[0])


recurrent = _define(
    "member_recurrent(str kind, Tensor x, Tensor[] state, Tensor[] weights, bool has_biases, int num_layers, "
    "float dropout, bool train, bool bidirectional, bool batch_first) -> Tensor[]",
    _recurrent,
    _vmap_recurrent,
)


# ------------------------------------------------------------------------------------------------- shared dropout


def _noise(like, p):
    return F.dropout(torch.ones_like(like), p)


def _vmap_noise(info, in_dims, like, p):
    return shared_noise(like, p), in_dims[0]


# Not composite: by the time that a kernel runs, torch.func's levels are over, and with them their rule for randomness.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)
LIBRARY.define("shared_noise(Tensor like, float p) -> Tensor", tags=_TAGS)
LIBRARY.impl("shared_noise", _noise, "CompositeExplicitAutograd")
torch.library.register_vmap("effens_kernels::shared_noise", _vmap_noise, lib=LIBRARY)
shared_noise = torch.ops.effens_kernels.shared_noise.default
