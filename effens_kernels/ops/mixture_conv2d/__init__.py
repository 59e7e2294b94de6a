"""mixture_conv2d: one convolution per member, each weight a linear combination of shared templates.

With its siblings for other numbers of axes and directions, which differ in how options are read.
"""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast
from .._convolution import Call, Numbers, Options, check_tensors, read, read_transposed
from .._registration import is_plain_eager
from . import reference, synthesis

__all__ = ["mixture_conv1d", "mixture_conv2d", "mixture_conv_transpose2d"]


def mixture_conv2d(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Apply one convolution per ensemble member, whose weight is its own combination of shared templates.

    .. math:: y_e = \mathrm{conv}\Bigl(x_e, \textstyle\sum_t \alpha_{et} T_t\Bigr) + b_e, \qquad e = 1 \dots E

    the layer of MixtureEnsembles (Teterwak et al. 2021, "MixtureEnsembles: Leveraging Parameter Sharing for Efficient
    Ensembles", equation 1).  The weights of all members are mixed at once, as by :func:`mix_templates`, so that each
    template is read once; then PyTorch's convolution runs member by member.

    Args:
        x: `[B, C, H, W]`, the same images for every member (never expanded), or `[E, B, C, H, W]`, images per member.
        coefficients: `[E, T]`, those of each member.
        templates: `[T, O, C / groups, kh, kw]`, shared by the members.
        bias: `[O]`, shared, `[E, O]`, or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding may be "same" or "valid".
        backend: None (automatic), "cpu", "triton" or "cuda": what mixes the weights, and takes the gradients of
            coefficients and templates from those of the weights; the convolution is PyTorch's on each.  A named
            backend never falls back.  "reference": all of it in PyTorch's operations, under its autograd.

    Returns:
        `[E, B, O, H', W']`, in the dtype of `x` (under autocast: its dtype).  The images of each member lie as
        `torch.nn.functional.conv2d` leaves them: channels_last stays channels_last.

    All tensors share one dtype (float32, float16, bfloat16, float64) and one device.  In 16 bits, mixed weights and
    their gradients are rounded once, and sums over templates and members are accumulated in float32.  `B = 0` and
    `E = 0` give empty results.  Differentiable any number of times in all tensors; kept for backward: `x` (padded,
    where "same" is uneven), `coefficients` and `templates`.  The weights of all members, E times the size of a
    template, exist while forward runs, and again (with their gradients) while backward does.  Under `torch.compile`
    and `torch.func`, and for second derivatives, it is made of :func:`mix_templates` and PyTorch's convolutions.

    Raises:
        TypeError: an argument is no tensor or no number, or of an unsupported or differing dtype.
        ValueError: ranks, sizes, options or devices do not fit; no templates; unknown backend; a backend that cannot
            run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, templates = torch.randn(32, 3, 28, 28), torch.randn(4, 64, 3, 3, 3)   # 5 members see the same images
        >>> ek.mixture_conv2d(x, torch.randn(5, 4), templates, torch.zeros(64), stride=2, padding=1).shape
        torch.Size([5, 32, 64, 14, 14])
    """
    arguments = x, coefficients, templates, bias, stride, padding, dilation, groups, backend
    return _convolution("mixture_conv2d", 2, *arguments)


def mixture_conv1d(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`mixture_conv2d` along one axis: x `[B, C, L]` or `[E, B, C, L]`, templates `[T, O, C / groups, k]`.

    Options are those of `torch.nn.functional.conv1d`; all else is as for :func:`mixture_conv2d`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, coefficients, templates = torch.randn(32, 8, 100), torch.randn(4, 3), torch.randn(3, 16, 8, 5)
        >>> ek.mixture_conv1d(x, coefficients, templates, padding="same").shape
        torch.Size([4, 32, 16, 100])
    """
    arguments = x, coefficients, templates, bias, stride, padding, dilation, groups, backend
    return _convolution("mixture_conv1d", 1, *arguments)


def mixture_conv_transpose2d(
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`mixture_conv2d` with transposed convolutions: templates `[T, C, O / groups, kh, kw]`.

    Options are those of `torch.nn.functional.conv_transpose2d`, in its order; all else is as for
    :func:`mixture_conv2d`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, coefficients, templates = torch.randn(4, 32, 8, 7, 7), torch.randn(4, 5), torch.randn(5, 8, 3, 2, 2)
        >>> ek.mixture_conv_transpose2d(x, coefficients, templates, stride=2).shape
        torch.Size([4, 32, 3, 14, 14])
    """
    op = "mixture_conv_transpose2d"
    x, coefficients, templates, bias = autocast(x, coefficients, templates, bias)
    _check_tensors(op, 2, x, coefficients, templates, bias)
    options = read_transposed(op, 2, stride, padding, output_padding, groups, dilation)
    return _run(op, x, coefficients, templates, bias, options, backend)


def _convolution(
    op: str,
    axes: int,
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
    backend: str | None,
) -> Tensor:
    x, coefficients, templates, bias = autocast(x, coefficients, templates, bias)
    _check_tensors(op, axes, x, coefficients, templates, bias)
    x, options = read(op, x, templates.shape[3:], stride, padding, dilation, groups)
    return _run(op, x, coefficients, templates, bias, options, backend)


def _run(
    op: str,
    x: Tensor,
    coefficients: Tensor,
    templates: Tensor,
    bias: Tensor | None,
    options: Options,
    backend: str | None,
) -> Tensor:
    _check_sizes(op, x, coefficients, templates, bias, options)
    sizes = *coefficients.shape, templates.shape[1:].numel()
    problem = _dispatch.Problem(op, x.device.type, x.dtype, sizes, x.device.index)
    mixing, composed = _dispatch.mixture_conv_route(problem, backend)
    if composed or coefficients.shape[0] == 0 or not is_plain_eager(x, coefficients, templates, bias):
        return reference.mixture_conv(x, coefficients, templates, bias, options, mixing)
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(coefficients.shape[0], -1)  # torch sums its gradient over the members
    return synthesis.apply(x, coefficients, templates, bias, options, mixing)


def _check_tensors(op: str, axes: int, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None) -> None:
    named = {"x": x, "coefficients": coefficients, "templates": templates, "bias": bias}
    check_tensors(op, axes, named, "templates", leading="T, ")


def _check_sizes(
    op: str, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None, options: Options
) -> None:
    call = Call(op, x, templates, "templates", options)
    _, outputs = call.channels()
    if coefficients.dim() != 2 or coefficients.shape[1] != templates.shape[0]:
        call.unfit("coefficients", f"[E, T={templates.shape[0]}]", coefficients)
    call.check(coefficients.shape[0], f"coefficients {list(coefficients.shape)}", outputs, bias)
