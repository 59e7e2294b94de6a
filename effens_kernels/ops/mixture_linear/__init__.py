"""mixture_linear: one linear layer per member, each weight a linear combination of shared templates."""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast, check_activation, check_alike, check_tensor, reject
from .._registration import needs_grad
from . import reference
from .autograd import FORM

__all__ = ["mixture_linear"]


def mixture_linear(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Apply one linear layer per ensemble member, whose weight is its own combination of shared templates.

    .. math:: y_e = \mathrm{act}\Bigl(x_e \bigl(\textstyle\sum_t \alpha_{et} T_t\bigr)^\top + b_e\Bigr),
              \qquad e = 1 \dots E

    the layer of MixtureEnsembles (Teterwak et al. 2021, "MixtureEnsembles: Leveraging Parameter Sharing for Efficient
    Ensembles", equation 1).

    Args:
        x: `[B, I]`, the same rows for every member (never expanded), or `[E, B, I]`, rows per member.
        coefficients: `[E, T]`, those of each member.
        templates: `[T, O, I]`, shared by the members.
        bias: `[O]`, shared, `[E, O]`, or None.
        activation: None, "relu", "gelu" (exact), "silu" or "tanh".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda"; a named backend never falls back.

    Returns:
        `[E, B, O]`, in the dtype of `x` (under autocast: its dtype).  Sums are accumulated in float32 at least.

    All tensors share one dtype (float32, float16, bfloat16, float64) and one device.  Any strides are accepted.  As in
    torch, `B = 0` and `E = 0` give empty results, and `I = 0` gives `act(bias)`.  Differentiable any number of times in
    all tensors; kept for backward: `x`, `coefficients`, `templates`, one `[E, B, O]` tensor where the activation needs
    it, and one `[T, B, O]` where shared rows go through the templates and their outputs are mixed.

    Raises:
        TypeError: an argument is no tensor, or of an unsupported or differing dtype.
        ValueError: ranks, sizes or devices do not fit; no templates; unknown activation or backend; a backend that
            cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, templates = torch.randn(32, 8), torch.randn(3, 64, 8)   # 5 members see the same 32 rows
        >>> ek.mixture_linear(x, torch.randn(5, 3), templates, torch.zeros(5, 64), activation="relu").shape
        torch.Size([5, 32, 64])
    """
    x, coefficients, templates, bias = autocast(x, coefficients, templates, bias)
    check("mixture_linear", x, coefficients, templates, bias, activation)
    sizes = coefficients.shape[0], x.shape[-2], x.shape[-1], templates.shape[1]
    training = needs_grad(x, coefficients, templates, bias)
    problem = _dispatch.Problem("mixture_linear", x.device.type, x.dtype, sizes, x.device.index, training)
    chosen = _dispatch.select(problem, backend)
    if chosen == "reference":
        return reference.mixture_linear(x, coefficients, templates, bias, activation)
    if bias is not None and bias.dim() == 1:  # a view of all members', whose gradient torch sums
        bias = bias.expand(coefficients.shape[0], -1)
    return FORM.apply(chosen, activation, x, coefficients, templates, bias)


def check(
    op: str, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    named = {"x": x, "coefficients": coefficients, "templates": templates, **({} if bias is None else {"bias": bias})}
    for name, tensor in named.items():
        check_tensor(op, name, tensor)
        check_alike(op, "x", x, name, tensor)
    if templates.dim() != 3:
        reject(op, "templates", "[T, O, I]", templates)
    count, outputs, inputs = templates.shape
    if count == 0:
        reject(op, "templates", "[T, O, I] of at least one template", templates)
    if x.dim() not in (2, 3):
        reject(op, "x", "[B, I] or [E, B, I]", x)
    if x.shape[-1] != inputs:
        reject(op, "x", f"[..., I={inputs}] to fit templates {list(templates.shape)}", x)
    if coefficients.dim() != 2 or coefficients.shape[1] != count:
        reject(op, "coefficients", f"[E, T={count}] to fit templates {list(templates.shape)}", coefficients)
    members = coefficients.shape[0]
    if x.dim() == 3 and x.shape[0] != members:
        reject(op, "x", f"[E={members}, B, I] to fit coefficients {list(coefficients.shape)}", x)
    if bias is not None and list(bias.shape) not in ([outputs], [members, outputs]):
        reject(op, "bias", f"[O={outputs}] or [E={members}, O={outputs}]", bias)
    check_activation(op, activation)
