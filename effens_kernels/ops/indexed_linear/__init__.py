"""indexed_linear: linear layers of which each group names its input and its weight by number."""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_index, check_range, check_tensor, reject
from .._registration import needs_grad, takes_cpu_engine
from . import batching, reference  # noqa: F401  (batching registers the vmap rules)
from .autograd import FORM

__all__ = ["indexed_linear"]


def indexed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x_index: Tensor,
    weight_index: Tensor,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Apply linear layers of which each group names its input and its weight, with the bias and activation fused.

    .. math:: y_g = \mathrm{act}(x_{p(g)} W_{e(g)}^\top + b_{e(g)}), \qquad g = 1 \dots G

    where :math:`p(g)` is `x_index[g]` and :math:`e(g)` is `weight_index[g]`: the layer of a prefix tree, in which paths
    share the layers they have in common (Oleksienko and Iosifidis 2022, "Layer Ensembles", where a sampled network
    takes one option per layer), and of any other pairing of P inputs with E members.  Inputs and weights are read where
    they lie: one that several groups use is neither repeated nor gathered, and its gradient is summed over these groups
    in their order, in one accumulator.

    Args:
        x: `[P, B, I]`, the inputs; `[1, B, I]` where all groups share one.
        weight: `[E, O, I]`.
        bias: `[E, O]`, `[O]`, shared, or None.
        x_index: integers `[G]` in 0..P-1.
        weight_index: integers `[G]` in 0..E-1.
        activation: None, "relu", "gelu" (exact), "silu" or "tanh".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[G, B, O]`, in the dtype of `x` (under autocast: its dtype).  Sums are accumulated in float32 at least.

    `x`, `weight` and `bias` share one dtype (float32, float16, bfloat16, float64); indices are int32 or int64, on the
    same device, in any order and with any repetitions.  Any strides are accepted.  As in torch, empty axes give empty
    results, and `I = 0` gives `act(bias)`.  Differentiable any number of times in `x`, `weight` and `bias`; an input or
    a weight that no group uses has a gradient of zero.  Kept for backward: `x`, `weight`, the indices, and one
    `[G, B, O]` tensor where the activation needs it.  On a GPU, values of indices are not read by the host, and have
    to be in range.  Where they are not, the backend "cuda" reads nothing: the group's result is zeros, and it adds
    nothing to any gradient.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: ranks, sizes or devices do not fit; on a CPU, an index out of range (RuntimeError under
            `torch.compile` and `torch.export`); unknown activation or backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight = torch.randn(2, 32, 8), torch.randn(5, 64, 8)   # 2 prefixes, 5 options of the next layer
        >>> prefix, option = torch.tensor([0, 0, 1]), torch.tensor([3, 1, 3])   # 3 paths
        >>> ek.indexed_linear(x, weight, x_index=prefix, weight_index=option, activation="relu").shape
        torch.Size([3, 32, 64])
    """
    x, weight, bias = autocast(x, weight, bias)
    tensors = x, weight, x_index, weight_index, bias
    if takes_cpu_engine("indexed_linear", backend, *tensors):
        try:
            return FORM.apply_plain("cpu", activation, *tensors[:4], _per_member(bias, weight))
        except Exception:  # the engine checks for itself; if the arguments are at fault, these words are better
            check("indexed_linear", *tensors, activation)
            raise
    check("indexed_linear", *tensors, activation)
    training = needs_grad(x, weight, bias)
    problem = _dispatch.Problem("indexed_linear", x.device.type, x.dtype, (), x.device.index, training)
    chosen = _dispatch.select(problem, backend)
    if chosen == "reference":
        return reference.indexed_linear(x, weight, bias, activation, x_index=x_index, weight_index=weight_index)
    return FORM.apply(chosen, activation, *tensors[:4], _per_member(bias, weight))


def _per_member(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """A shared bias as a view of all members', whose gradient torch sums."""
    return bias if bias is None or bias.dim() != 1 else bias.expand(weight.shape[0], -1)


def check(
    op: str,
    x: Tensor,
    weight: Tensor,
    x_index: Tensor,
    weight_index: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    for name, tensor in {"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}.items():
        check_tensor(op, name, tensor)
        check_alike(op, "x", x, name, tensor)
    if weight.dim() != 3:
        reject(op, "weight", "[E, O, I]", weight)
    members, outputs, inputs = weight.shape
    if x.dim() != 3:
        reject(op, "x", "[P, B, I]", x)
    if x.shape[2] != inputs:
        reject(op, "x", f"[P, B, I={inputs}] to fit weight {list(weight.shape)}", x)
    if bias is not None and list(bias.shape) not in ([outputs], [members, outputs]):
        reject(op, "bias", f"[O={outputs}] or [E={members}, O={outputs}]", bias)
    check_activation(op, activation)
    check_index(op, "x_index", x_index, x)
    check_index(op, "weight_index", weight_index, x)
    if x_index.shape != weight_index.shape:
        reject(op, "weight_index", f"[G={x_index.shape[0]}] like x_index", weight_index)
    check_range(op, "x_index", x_index, x.shape[0], "x")
    check_range(op, "weight_index", weight_index, members, "weight")
