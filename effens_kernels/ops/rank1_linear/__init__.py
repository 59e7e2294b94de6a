"""rank1_linear: the BatchEnsemble layer, one weight for all members and a scale per member on either side of it."""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_tensor, reject
from .._registration import needs_grad, takes_cpu_engine, takes_torch
from . import reference
from .autograd import FORM

__all__ = ["rank1_linear"]


def rank1_linear(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Apply one shared linear layer, scaled per ensemble member on its inputs and outputs, with bias and activation.

    .. math:: y_e = \mathrm{act}\bigl(((x_e \circ r_e) W^\top) \circ s_e + b_e\bigr), \qquad e = 1 \dots E

    which is a linear layer of weight :math:`W \circ s_e r_e^\top`: BatchEnsemble (Wen et al. 2020, "BatchEnsemble: An
    Alternative Approach to Efficient Ensemble and Lifelong Learning", equations 1 and 5).  Neither that weight, nor
    scaled inputs, nor unscaled outputs are ever written to memory.

    `r` scales inputs and `s` outputs, as in the paper's code and in every library.  Some tutorials name them the other
    way round (`r` of outputs, `s` of inputs), and some scale the bias too, `s * (W x + b)`: pass `bias * s` for that.

    Args:
        x: `[B, I]`, the same rows for every member (never expanded), or `[E, B, I]`, rows per member.
        weight: `[O, I]`, shared by the members.
        r: `[E, I]`, scales of the inputs.
        s: `[E, O]`, scales of the outputs.
        bias: `[O]`, shared, `[E, O]`, or None.
        activation: None, "relu", "gelu" (exact), "silu" or "tanh".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[E, B, O]`, in the dtype of `x` (under autocast: its dtype).  Sums are accumulated in float32 at least.

    All tensors share one dtype (float32, float16, bfloat16, float64) and one device.  Any strides are accepted;
    views such as `x.transpose(0, 1)` of `[B, E, I]` cost no copy.  As in torch, `B = 0` and `E = 0` give
    empty results, and `I = 0` gives `act(bias)`.  Differentiable any number of times in all tensors; kept for
    backward: `x`, `weight`, `r`, `s`, and one `[E, B, O]` tensor where the activation needs it.  On a CPU, float32 and
    bfloat16 calls of few rows (B below I*O / 4096 with gradients) are faster as PyTorch's own operations and run so,
    unless a backend is named; these do keep scaled inputs and unscaled outputs.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: ranks, sizes or devices do not fit; unknown activation or backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight = torch.randn(32, 8), torch.randn(64, 8)   # 5 members see the same 32 rows
        >>> r, s = 1 + 0.1 * torch.randn(5, 8), 1 + 0.1 * torch.randn(5, 64)
        >>> ek.rank1_linear(x, weight, r, s, torch.zeros(64), activation="relu").shape
        torch.Size([5, 32, 64])
    """
    x, weight, r, s, bias = autocast(x, weight, r, s, bias)
    tensors = x, weight, r, s, bias
    if takes_cpu_engine("rank1_linear", backend, *tensors) and not takes_torch("rank1_linear", backend, *tensors):
        try:
            return FORM.apply_plain("cpu", activation, x, weight, r, s, _per_member(bias, r))
        except Exception:  # the engine checks for itself; if the arguments are at fault, these words are better
            check("rank1_linear", x, weight, r, s, bias, activation)
            raise
    check("rank1_linear", x, weight, r, s, bias, activation)
    sizes = r.shape[0], x.shape[-2], x.shape[-1], weight.shape[0]
    training = needs_grad(x, weight, r, s, bias)
    problem = _dispatch.Problem("rank1_linear", x.device.type, x.dtype, sizes, x.device.index, training)
    chosen = _dispatch.select(problem, backend)
    if chosen == "reference":
        return reference.rank1_linear(x, weight, r, s, bias, activation)
    return FORM.apply(chosen, activation, x, weight, r, s, _per_member(bias, r))


def _per_member(bias: Tensor | None, r: Tensor) -> Tensor | None:
    """A shared bias as a view of all members', whose gradient torch sums."""
    return bias if bias is None or bias.dim() != 1 else bias.expand(r.shape[0], -1)


def check(
    op: str, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    named = {"x": x, "weight": weight, "r": r, "s": s, **({} if bias is None else {"bias": bias})}
    for name, tensor in named.items():
        check_tensor(op, name, tensor)
        check_alike(op, "x", x, name, tensor)
    if weight.dim() != 2:
        reject(op, "weight", "[O, I]", weight)
    if x.dim() not in (2, 3):
        reject(op, "x", "[B, I] or [E, B, I]", x)
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        reject(op, "x", f"[..., I={inputs}] to fit weight {list(weight.shape)}", x)
    if r.dim() != 2 or r.shape[1] != inputs:
        reject(op, "r", f"[E, I={inputs}] (scales of the inputs) to fit weight {list(weight.shape)}", r)
    members = r.shape[0]
    if s.dim() != 2 or s.shape[1] != outputs:
        reject(op, "s", f"[E, O={outputs}] (scales of the outputs) to fit weight {list(weight.shape)}", s)
    if s.shape[0] != members:
        reject(op, "s", f"[E={members}, O={outputs}] to fit r {list(r.shape)}", s)
    if x.dim() == 3 and x.shape[0] != members:
        reject(op, "x", f"[E={members}, B, I] to fit r {list(r.shape)}", x)
    if bias is not None and list(bias.shape) not in ([outputs], [members, outputs]):
        reject(op, "bias", f"[O={outputs}] or [E={members}, O={outputs}]", bias)
    check_activation(op, activation)
