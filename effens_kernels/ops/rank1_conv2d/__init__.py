"""rank1_conv2d: the BatchEnsemble convolution, one weight for all members and a scale per member on either side of it.

With its siblings for other numbers of axes and directions, which differ in how options are read.
"""

from __future__ import annotations

from torch import Tensor

from ... import _dispatch
from .._checks import autocast, reject
from .._convolution import Call, Numbers, Options, check_tensors, read, read_transposed
from .._registration import is_plain_eager
from ..rank1_linear import rank1_linear
from . import folded, reference

__all__ = ["rank1_conv1d", "rank1_conv2d", "rank1_conv_transpose2d"]


def rank1_conv2d(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Apply one shared convolution, scaled per ensemble member on its input and output channels.

    .. math:: y_e = \mathrm{conv}(x_e \circ r_e, W) \circ s_e + b_e, \qquad e = 1 \dots E

    where `r` and `s` multiply whole channels: BatchEnsemble (Wen et al. 2020, "BatchEnsemble: An Alternative Approach
    to Efficient Ensemble and Lifelong Learning", equation 5).  It runs as PyTorch's convolution of weight
    :math:`s_e W r_e`, member by member, so that no image is scaled, in forward or backward; 1 x 1 kernels on
    channels_last images of a CPU run as :func:`rank1_linear` of their pixels.

    Args:
        x: `[B, C, H, W]`, the same images for every member (never expanded), or `[E, B, C, H, W]`, images per member.
        weight: `[O, C / groups, kh, kw]`, shared by the members.
        r: `[E, C]`, scales of the input channels.
        s: `[E, O]`, scales of the output channels; they do not scale the bias.
        bias: `[O]`, shared, `[E, O]`, or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding may be "same" or "valid".
        backend: None (as above, on every device), or "reference", which scales the images; there are no
            kernels of this package for it, so other names are refused.

    Returns:
        `[E, B, O, H', W']`, in the dtype of `x` (under autocast: its dtype).  The images of each member lie as
        `torch.nn.functional.conv2d` leaves them: channels_last stays channels_last.

    All tensors share one dtype (float32, float16, bfloat16, float64) and one device.  In 16 bits, the folded weight is
    rounded once, and what is summed over the convolution's results is summed in float32.  `B = 0` and `E = 0` give
    empty results.  Differentiable any number of times in all tensors; kept for backward: `x` (padded, where "same" is
    uneven), `weight`, `r` and `s`.  Under `torch.compile` and `torch.func`, and for second derivatives, it is made of
    PyTorch's operations on scaled images.

    Raises:
        TypeError: an argument is no tensor or no number, or of an unsupported or differing dtype.
        ValueError: ranks, sizes, options or devices do not fit; unknown backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight = torch.randn(32, 3, 28, 28), torch.randn(64, 3, 3, 3)   # 5 members see the same 32 images
        >>> r, s = 1 + 0.1 * torch.randn(5, 3), 1 + 0.1 * torch.randn(5, 64)
        >>> ek.rank1_conv2d(x, weight, r, s, torch.zeros(64), stride=2, padding=1).shape
        torch.Size([5, 32, 64, 14, 14])
    """
    return _convolution("rank1_conv2d", 2, x, weight, r, s, bias, stride, padding, dilation, groups, backend)


def rank1_conv1d(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`rank1_conv2d` along one axis: x `[B, C, L]` or `[E, B, C, L]`, weight `[O, C / groups, k]`.

    Options are those of `torch.nn.functional.conv1d`; all else is as for :func:`rank1_conv2d`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight, r, s = torch.randn(32, 8, 100), torch.randn(16, 8, 5), torch.randn(4, 8), torch.randn(4, 16)
        >>> ek.rank1_conv1d(x, weight, r, s, padding="same").shape
        torch.Size([4, 32, 16, 100])
    """
    return _convolution("rank1_conv1d", 1, x, weight, r, s, bias, stride, padding, dilation, groups, backend)


def rank1_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`rank1_conv2d` with a transposed convolution: weight `[C, O / groups, kh, kw]`.

    Options are those of `torch.nn.functional.conv_transpose2d`, in its order; all else is as for :func:`rank1_conv2d`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, weight, r, s = torch.randn(4, 32, 8, 7, 7), torch.randn(8, 3, 2, 2), torch.randn(4, 8), torch.randn(4, 3)
        >>> ek.rank1_conv_transpose2d(x, weight, r, s, stride=2).shape
        torch.Size([4, 32, 3, 14, 14])
    """
    op = "rank1_conv_transpose2d"
    x, weight, r, s, bias = autocast(x, weight, r, s, bias)
    _check_tensors(op, 2, x, weight, r, s, bias)
    options = read_transposed(op, 2, stride, padding, output_padding, groups, dilation)
    return _run(op, x, weight, r, s, bias, options, backend)


def _convolution(
    op: str,
    axes: int,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
    backend: str | None,
) -> Tensor:
    x, weight, r, s, bias = autocast(x, weight, r, s, bias)
    _check_tensors(op, axes, x, weight, r, s, bias)
    x, options = read(op, x, weight.shape[2:], stride, padding, dilation, groups)
    return _run(op, x, weight, r, s, bias, options, backend)


def _run(
    op: str, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, options: Options, backend: str | None
) -> Tensor:
    _check_sizes(op, x, weight, r, s, bias, options)
    problem = _dispatch.Problem(op, x.device.type, x.dtype)
    plain = r.shape[0] > 0 and is_plain_eager(x, weight, r, s, bias)
    route = _dispatch.rank1_conv_route(problem, backend, plain and _is_pointwise(x, weight, options))
    if route == "reference" or not plain:
        return reference.rank1_conv(x, weight, r, s, bias, options)
    if route == "rank1_linear":
        pixels = x.movedim(-3, -1)
        y = rank1_linear(pixels.flatten(-4, -2), weight.flatten(1), r, s, bias, backend="cpu")
        return y.unflatten(1, pixels.shape[-4:-1]).movedim(-1, -3)
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(r.shape[0], -1)  # torch sums its gradient over the members
    return folded.apply(x, weight, r, s, bias, options)


def _is_pointwise(x: Tensor, weight: Tensor, options: Options) -> bool:
    """A 1 x 1 convolution of images that certainly are channels_last: then it is one product of all pixels."""
    return (
        tuple(weight.shape[2:]) == (1, 1)
        and options._replace(dilation=(1, 1)) == Options.default(2)
        and x.stride(-1) == x.shape[-3] != 1
        and x.movedim(-3, -1).is_contiguous()
    )


def _check_tensors(op: str, axes: int, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> None:
    check_tensors(op, axes, {"x": x, "weight": weight, "r": r, "s": s, "bias": bias}, "weight")


def _check_sizes(
    op: str, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, options: Options
) -> None:
    call = Call(op, x, weight, "weight", options)
    inputs, outputs = call.channels()
    if r.dim() != 2 or r.shape[1] != inputs:
        call.unfit("r", f"[E, C={inputs}] (scales of the inputs)", r)
    members = r.shape[0]
    if s.dim() != 2 or s.shape[1] != outputs:
        call.unfit("s", f"[E, O={outputs}] (scales of the outputs)", s)
    if s.shape[0] != members:
        reject(op, "s", f"[E={members}, O={outputs}] to fit r {list(r.shape)}", s)
    call.check(members, f"r {list(r.shape)}", outputs, bias)
