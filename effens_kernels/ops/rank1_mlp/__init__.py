"""rank1_mlp: a multilayer perceptron per ensemble member whose layers share their weights, as in BatchEnsemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_tensor, reject
from .._registration import needs_grad, takes_cpu_engine, takes_torch
from ..rank1_linear import rank1_linear
from . import autograd, reference

__all__ = ["rank1_mlp"]


def rank1_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    r: Sequence[Tensor],
    s: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str | None = "relu",
    out_activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Apply one multilayer perceptron per ensemble member, all members' layers sharing their weights.

    .. math:: h_{e,0} = x_e, \quad
              h_{e,l} = \mathrm{act}\bigl(((h_{e,l-1} \circ r_{e,l}) W_l^\top) \circ s_{e,l} + b_{e,l}\bigr),
              \quad l = 1 \dots L

    a chain of :func:`rank1_linear`, with the same values, that enters PyTorch's autograd once: the network of
    BatchEnsemble (Wen et al. 2020) and of TabM (Gorishniy et al. 2025, "TabM: Advancing Tabular Deep Learning with
    Parameter-Efficient Ensembling").

    Args:
        x: `[B, I]`, the same rows for every member, or `[E, B, I]`.
        weights: one `[O, I]` per layer, the O of each being the I of the next.
        r: one `[E, I]` per layer, scales of its inputs.
        s: one `[E, O]` per layer, scales of its outputs.
        biases: one `[E, O]`, `[O]` (shared) or None per layer; None for no biases at all.
        activation: after each layer but the last; None, "relu", "gelu" (exact), "silu" or "tanh".
        out_activation: after the last layer; the same choice.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[E, B, O]` of the last layer, in the dtype of `x` (under autocast: its dtype).

    Strides, dtypes, empty sizes and derivatives of any order are as for :func:`rank1_linear`.  Kept for backward: `x`,
    the parameters, each hidden layer's output, and where the activation needs it (gelu, silu) its pre-activation.
    Where :func:`rank1_linear` would run some layer as PyTorch's own operations, so does this, layer after layer.

    Raises:
        TypeError: an argument is no tensor or no sequence, or of an unsupported or differing dtype.
        ValueError: no layer; sizes do not chain; members or devices differ; unknown activation or backend.

    Example:
        >>> import torch, effens_kernels as ek
        >>> sizes = [(64, 8), (3, 64)]   # 8-64-3, 5 members
        >>> weights = [torch.randn(o, i) for o, i in sizes]
        >>> r, s = [torch.ones(5, i) for _, i in sizes], [torch.ones(5, o) for o, _ in sizes]
        >>> ek.rank1_mlp(torch.randn(32, 8), weights, r, s).shape
        torch.Size([5, 32, 3])
    """
    check_sequences(weights, r, s, biases)
    depth = len(weights)
    x, *flat = autocast(x, *weights, *r, *s, *([None] * depth if biases is None else biases))
    groups = [flat[n * depth : (n + 1) * depth] for n in range(4)]
    if takes_cpu_engine("rank1_mlp", backend, x, *flat) and not _some_take_torch(x, groups, flat, backend):
        try:
            return autograd.apply_plain(x, groups, activation, out_activation)
        except Exception:  # the engine checks for itself; if the arguments are at fault, these words are better
            check(x, *groups, activation, out_activation)
            raise
    check(x, *groups, activation, out_activation)
    training = needs_grad(x, *flat)
    chosen = _dispatch.select(_dispatch.Problem("rank1_mlp", x.device.type, x.dtype), backend)
    if any(_layer_backend(x, *layer, training, backend) != chosen for layer in zip(*groups[:2])):

        def linear(*arguments):
            return rank1_linear(*arguments[:-1], activation=arguments[-1], backend=backend)

        return reference.layers(linear, x, *groups, activation, out_activation)
    if chosen == "reference":
        return reference.rank1_mlp(x, *groups, activation, out_activation)
    return autograd.chain(x, groups, activation, out_activation, chosen)


def _some_take_torch(x: Tensor, groups: autograd.Groups, flat: Sequence[Tensor | None], backend: str | None) -> bool:
    """Whether rank1_linear would run a layer as torch's operations, or the arguments are at fault."""
    return any(takes_torch("rank1_linear", backend, x, weight, *flat) for weight in groups[0])


def _layer_backend(x: Tensor, weight: Tensor, r: Tensor, training: bool, backend: str | None) -> str:
    """What rank1_linear would choose for a layer that is trained if any is."""
    sizes = r.shape[0], x.shape[-2], *reversed(weight.shape)
    problem = _dispatch.Problem("rank1_linear", x.device.type, x.dtype, sizes, x.device.index, training)
    return _dispatch.select(problem, backend)


_SEQUENCES = (list, tuple, torch.nn.ParameterList)


def check_sequences(weights: object, r: object, s: object, biases: object) -> None:
    op = "rank1_mlp"
    for name, given in {"weights": weights, "r": r, "s": s}.items():
        if not isinstance(given, _SEQUENCES):
            reject(op, name, "a list or tuple of tensors, one per layer", given, TypeError)
        if len(weights) == 0:
            reject(op, "weights", "at least one layer", "none")
        if len(given) != len(weights):
            reject(op, name, f"{len(weights)}, one per weight", str(len(given)))
    if biases is not None:
        if not isinstance(biases, _SEQUENCES):
            reject(op, "biases", "None or a list or tuple of tensors or None, one per layer", biases, TypeError)
        if len(biases) != len(weights):
            reject(op, "biases", f"{len(weights)}, one per weight", str(len(biases)))


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    r: Sequence[Tensor],
    s: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None,
    out_activation: str | None,
) -> None:
    op = "rank1_mlp"
    check_tensor(op, "x", x)
    if x.dim() not in (2, 3):
        reject(op, "x", "[B, I] or [E, B, I]", x)
    for name, group in {"weights": weights, "r": r, "s": s, "biases": biases}.items():
        for n, tensor in enumerate(group):
            if tensor is not None or name != "biases":
                check_tensor(op, f"{name}[{n}]", tensor)
                check_alike(op, "x", x, f"{name}[{n}]", tensor)
    width, before = x.shape[-1], f"x {list(x.shape)}"
    members, first = (x.shape[0], before) if x.dim() == 3 else (None, "")
    for n, (weight, scale_in, scale_out, bias) in enumerate(zip(weights, r, s, biases)):
        sizes = list(weight.shape)
        if weight.dim() != 2:
            reject(op, f"weights[{n}]", "[O, I]", weight)
        if sizes[1] != width:
            if n == 0:
                reject(op, "x", f"[..., I={sizes[1]}] to fit weights[0] {sizes}", x)
            reject(op, f"weights[{n}]", f"[O, I={width}] to follow {before}", weight)
        width, before = sizes[0], f"weights[{n}] {sizes}"
        for name, scale, size in (("r", scale_in, sizes[1]), ("s", scale_out, sizes[0])):
            axis = "I" if name == "r" else "O"
            if scale.dim() != 2 or scale.shape[1] != size:
                reject(op, f"{name}[{n}]", f"[E, {axis}={size}] to fit {before}", scale)
            if members is None:
                members, first = scale.shape[0], f"{name}[{n}] {list(scale.shape)}"
            if scale.shape[0] != members:
                reject(op, f"{name}[{n}]", f"[E={members}, {axis}={size}] as {first}", scale)
        if bias is not None and list(bias.shape) not in ([width], [members, width]):
            reject(op, f"biases[{n}]", f"[O={width}] or [E={members}, O={width}]", bias)
    check_activation(op, activation)
    check_activation(op, out_activation, "out_activation")
