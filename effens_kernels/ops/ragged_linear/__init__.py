"""ragged_linear: one linear layer per ensemble member, on rows sorted by member, each with a number of its own."""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_index, check_offsets, check_tensor, reject
from .._registration import needs_grad, takes_cpu_engine
from . import batching, reference  # noqa: F401  (batching registers the vmap rules)
from .autograd import FORM

__all__ = ["ragged_linear"]


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Apply to each row the linear layer of its member, rows sorted by member, with the bias and activation fused.

    .. math:: y_n = \mathrm{act}(x_n W_e^\top + b_e), \qquad \mathrm{offsets}_e \le n < \mathrm{offsets}_{e+1}

    the layer of members that see different data, or as many rows as each happens to be sent (bootstrap ensembles,
    mixtures of experts).  No row is padded, and no member waits for the largest.

    Args:
        x: `[N, I]`, the rows of member 0, then those of member 1, and so on.
        weight: `[E, O, I]`.
        bias: `[E, O]`, `[O]`, shared, or None.
        offsets: integers `[E + 1]`, where the members' rows begin, and N: from 0, never decreasing.  A member may have
            no rows.
        activation: None, "relu", "gelu" (exact), "silu" or "tanh".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[N, O]`, in the dtype of `x` (under autocast: its dtype).  Sums are accumulated in float32 at least.

    `x`, `weight` and `bias` share one dtype (float32, float16, bfloat16, float64); offsets are int32 or int64, on the
    same device.  Any strides are accepted.  As in torch, empty axes give empty results, and `I = 0` gives `act(bias)`.
    Differentiable any number of times in `x`, `weight` and `bias`; the gradient of a weight without rows is zero.  Kept
    for backward: `x`, `weight`, `offsets`, and one `[N, O]` tensor where the activation needs it.  On a GPU, kernels do
    not make the host wait for the offsets: values are clamped to 0..N, and rows of no member give zeros.  Results of
    offsets that decrease are undefined there.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: ranks, sizes or devices do not fit; on a CPU, wrong values of offsets (RuntimeError under
            `torch.compile` and `torch.export`); unknown activation or backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight = torch.randn(10, 8), torch.randn(3, 64, 8)
        >>> offsets = torch.tensor([0, 6, 6, 10])   # 6 rows of member 0, none of member 1, 4 of member 2
        >>> ek.ragged_linear(x, weight, offsets=offsets, activation="relu").shape
        torch.Size([10, 64])
    """
    x, weight, bias = autocast(x, weight, bias)
    tensors = x, weight, offsets, bias
    if takes_cpu_engine("ragged_linear", backend, *tensors):
        try:
            return FORM.apply_plain("cpu", activation, *tensors[:3], _per_member(bias, weight))
        except Exception:  # the engine checks for itself; if the arguments are at fault, these words are better
            check("ragged_linear", *tensors, activation)
            raise
    check("ragged_linear", *tensors, activation)
    training = needs_grad(x, weight, bias)
    problem = _dispatch.Problem("ragged_linear", x.device.type, x.dtype, (), x.device.index, training)
    chosen = _dispatch.select(problem, backend)
    if chosen == "reference":
        return reference.ragged_linear(x, weight, bias, activation, offsets=offsets)
    return FORM.apply(chosen, activation, *tensors[:3], _per_member(bias, weight))


def _per_member(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """A shared bias as a view of all members', whose gradient torch sums."""
    return bias if bias is None or bias.dim() != 1 else bias.expand(weight.shape[0], -1)


def check(op: str, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, activation: str | None) -> None:
    for name, tensor in {"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}.items():
        check_tensor(op, name, tensor)
        check_alike(op, "x", x, name, tensor)
    if weight.dim() != 3:
        reject(op, "weight", "[E, O, I]", weight)
    members, outputs, inputs = weight.shape
    if x.dim() != 2:
        reject(op, "x", "[N, I]", x)
    if x.shape[1] != inputs:
        reject(op, "x", f"[N, I={inputs}] to fit weight {list(weight.shape)}", x)
    if bias is not None and list(bias.shape) not in ([outputs], [members, outputs]):
        reject(op, "bias", f"[O={outputs}] or [E={members}, O={outputs}]", bias)
    check_activation(op, activation)
    check_index(op, "offsets", offsets, x)
    if offsets.shape[0] != members + 1:
        reject(op, "offsets", f"[E + 1 = {members + 1}] to fit weight {list(weight.shape)}", offsets)
    check_offsets(op, offsets, x.shape[0])
