"""grouped_linear: one linear layer per ensemble member, all members in one call."""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_tensor, reject
from .._registration import needs_grad, takes_cpu_engine, takes_torch
from . import batching, reference  # noqa: F401  (batching registers the vmap rules)
from .autograd import FORM

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, backend: str | None = None
) -> Tensor:
    r"""Apply one linear layer per ensemble member, with the bias and activation fused.

    .. math:: y_e = \mathrm{act}(x_e W_e^\top + b_e), \qquad e = 1 \dots E

    the layer of a deep ensemble (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles", section 2.4): each member is a `torch.nn.functional.linear`.

    Args:
        x: `[B, I]`, the same rows for every member (never expanded), or `[E, B, I]`, rows per member.
        weight: `[E, O, I]`.
        bias: `[E, O]` or None.
        activation: None, "relu", "gelu" (exact), "silu" or "tanh".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[E, B, O]`, in the dtype of `x` (under autocast: its dtype).  Sums are accumulated in float32 at least.

    All tensors share one dtype (float32, float16, bfloat16, float64) and one device.  Any strides are accepted;
    views such as `x.transpose(0, 1)` of `[B, E, I]` cost no copy.  As in torch, `B = 0` and `E = 0` give
    empty results, and `I = 0` gives `act(bias)`.  Differentiable any number of times in `x`, `weight` and `bias`;
    kept for backward: `x`, `weight`, and one `[E, B, O]` tensor where the activation needs it.  On a CPU, float32 calls
    of very few rows with large weights (B below I*O / 131,072 with gradients) run as PyTorch's own operations, unless a
    backend is named: they are faster.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: ranks, sizes or devices do not fit; unknown activation or backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight = torch.randn(32, 8), torch.randn(5, 64, 8)   # 5 members see the same 32 rows
        >>> ek.grouped_linear(x, weight, torch.zeros(5, 64), activation="relu").shape
        torch.Size([5, 32, 64])
    """
    return run("grouped_linear", x, weight, bias, activation, backend)


def run(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str | None) -> Tensor:
    """Check, choose, run; `op` is the name that errors speak of."""
    x, weight, bias = autocast(x, weight, bias)
    tensors = x, weight, bias
    if takes_cpu_engine("grouped_linear", backend, *tensors) and not takes_torch("grouped_linear", backend, *tensors):
        try:
            return FORM.apply_plain("cpu", activation, x, weight, bias)
        except Exception:  # the engine checks for itself; if the arguments are at fault, these words are better
            check(op, x, weight, bias, activation)
            raise
    check(op, x, weight, bias, activation)
    sizes = weight.shape[0], x.shape[-2], x.shape[-1], weight.shape[1]
    training = needs_grad(x, weight, bias)
    problem = _dispatch.Problem("grouped_linear", x.device.type, x.dtype, sizes, x.device.index, training)
    chosen = _dispatch.select(problem, backend)
    if chosen == "reference":
        return reference.grouped_linear(x, weight, bias, activation)
    return FORM.apply(chosen, activation, x, weight, bias)


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight)
    check_alike(op, "x", x, "weight", weight)
    if weight.dim() != 3:
        reject(op, "weight", "[E, O, I]", weight)
    if x.dim() not in (2, 3):
        reject(op, "x", "[B, I] or [E, B, I]", x)
    members, outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        reject(op, "x", f"[..., I={inputs}] to fit weight {list(weight.shape)}", x)
    if x.dim() == 3 and x.shape[0] != members:
        reject(op, "x", f"[E={members}, B, I] to fit weight {list(weight.shape)}", x)
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_alike(op, "x", x, "bias", bias)
        if bias.dim() != 2 or bias.shape[0] != members or bias.shape[1] != outputs:
            reject(op, "bias", f"[E={members}, O={outputs}]", bias)
    check_activation(op, activation)
