"""ensemble_mlp: one multilayer perceptron per ensemble member, all layers of all members in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_tensor, reject
from .._registration import plain_backend
from . import autograd, reference

__all__ = ["ensemble_mlp"]


def ensemble_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str | None = "relu",
    out_activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Apply one multilayer perceptron per ensemble member.

    .. math:: h_{e,0} = x_e, \quad h_{e,l} = \mathrm{act}(h_{e,l-1} W_{e,l}^\top + b_{e,l}), \quad l = 1 \dots L

    a chain of :func:`grouped_linear`, with the same values, that keeps what one layer hands to the next in cache and
    enters PyTorch's autograd once (deep ensembles: Lakshminarayanan et al. 2017, section 2.4).  On a GPU all layers are
    one launch up to 8 layers with at most 256 outputs each (128 in float32 on GPUs of less than 122 KiB of shared
    memory a block); others run layer by layer.

    Args:
        x: `[B, I]`, the same rows for every member, or `[E, B, I]`.
        weights: one `[E, O, I]` per layer, the O of each being the I of the next; `[1, O, I]` for a layer whose weights
            all members share (the trunk of a multi-head model).  The last may be `[E, H, O, I]`: H heads per member.
        biases: one `[E, O]` (`[1, O]` where the weight is shared, `[E, H, O]` of heads) or None per layer; None for no
            biases at all.
        activation: after each layer but the last; None, "relu", "gelu" (exact), "silu" or "tanh".
        out_activation: after the last layer; the same choice.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[E, B, O]` of the last layer, or `[E, B, H, O]` of heads, in the dtype of `x` (under autocast: its dtype); E is
        1 where neither `x` nor any layer has members.

    Strides, dtypes, empty sizes and derivatives of any order are as for :func:`grouped_linear`.  Kept for backward:
    `x`, the parameters, each hidden layer's output, and where the activation needs it (gelu, silu) its pre-activation.

    Raises:
        TypeError: an argument is no tensor or no sequence, or of an unsupported or differing dtype.
        ValueError: no layer; sizes do not chain; members or devices differ; unknown activation or backend.

    Example:
        >>> import torch, effens_kernels as ek
        >>> weights = [torch.randn(5, 64, 8), torch.randn(5, 3, 64)]   # 5 members, 8-64-3
        >>> biases = [torch.zeros(5, 64), torch.zeros(5, 3)]
        >>> ek.ensemble_mlp(torch.randn(32, 8), weights, biases).shape
        torch.Size([5, 32, 3])
    """
    check_sequences(weights, biases)
    depth = len(weights)
    x, *parameters = autocast(x, *weights, *([None] * depth if biases is None else biases))
    weights, biases = parameters[:depth], parameters[depth:]
    if not (isinstance(weights[-1], Tensor) and weights[-1].dim() == 4):
        return _apply(x, weights, biases, activation, out_activation, backend)
    check(x, weights, biases, activation, out_activation)  # before heads take another shape
    y = _apply(x, side_by_side(weights), side_by_side(biases), activation, out_activation, backend)
    return y.unflatten(-1, weights[-1].shape[1:3])


def side_by_side(parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The last layer's heads as so many more outputs."""
    *hidden, last = parameters
    return [*hidden, None if last is None else last.flatten(1, 2)]


def _apply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
    backend: str | None,
) -> Tensor:
    chosen = plain_backend("ensemble_mlp", backend, x, *weights, *biases)
    if chosen is not None:
        try:
            return autograd.apply_plain(x, weights, biases, activation, out_activation, chosen)
        except Exception:  # the kernels check for themselves; if the arguments are at fault, these words are better
            check(x, weights, biases, activation, out_activation)
            raise
    check(x, weights, biases, activation, out_activation)
    chosen = _dispatch.select(_dispatch.Problem("ensemble_mlp", x.device.type, x.dtype), backend)
    if chosen == "reference":
        return reference.ensemble_mlp(x, weights, biases, activation, out_activation)
    return autograd.chain(x, weights, biases, activation, out_activation, chosen)


_SEQUENCES = (list, tuple, torch.nn.ParameterList)


def check_sequences(weights: object, biases: object) -> None:
    op = "ensemble_mlp"
    if not isinstance(weights, _SEQUENCES):
        reject(op, "weights", "a list or tuple of tensors, one per layer", weights, TypeError)
    if len(weights) == 0:
        reject(op, "weights", "at least one layer", "none")
    if biases is not None:
        if not isinstance(biases, _SEQUENCES):
            reject(op, "biases", "None or a list or tuple of tensors or None, one per layer", biases, TypeError)
        if len(biases) != len(weights):
            reject(op, "biases", f"{len(weights)}, one per weight", str(len(biases)))


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
) -> None:
    op = "ensemble_mlp"
    check_tensor(op, "x", x)
    if x.dim() not in (2, 3):
        reject(op, "x", "[B, I] or [E, B, I]", x)
    width, before = x.shape[-1], f"x {list(x.shape)}"
    members, first = (x.shape[0], before) if x.dim() == 3 else (1, "")
    for n, (weight, bias) in enumerate(zip(weights, biases)):
        name = f"weights[{n}]"
        check_tensor(op, name, weight)
        check_alike(op, "x", x, name, weight)
        last = n == len(weights) - 1
        if weight.dim() != 3 and not (last and weight.dim() == 4):
            reject(op, name, "[E, O, I] or, of heads, [E, H, O, I]" if last else "[E, O, I]", weight)
        sizes = weight.shape
        if sizes[-1] != width:
            if n == 0:
                reject(op, "x", f"[..., I={sizes[-1]}] to fit {name} {list(sizes)}", x)
            reject(op, name, f"[E, O, I={width}] to follow {before}", weight)
        width, before = sizes[1], f"{name} {list(sizes)}"
        if sizes[0] != 1 and sizes[0] != members:
            if first:
                reject(op, name, f"[E={members}, O, I] as {first}, or [1, O, I]", weight)
            members, first = sizes[0], before
        if bias is not None:
            name = f"biases[{n}]"
            check_tensor(op, name, bias)
            check_alike(op, "x", x, name, bias)
            if bias.shape != sizes[:-1]:
                expected = f"[{sizes[0]}, O={width}]" if weight.dim() == 3 else str(list(sizes[:-1]))
                reject(op, name, f"{expected} as {before}", bias)
    check_activation(op, activation)
    check_activation(op, out_activation, "out_activation")
