"""TemplateBank: the templates that layers and members share, and which of them a layer takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import reject
from ._layout import positive


class Run(NamedTuple):
    """Where the templates of a layer lie in a bank."""

    start: int  # of the view: a template's index, or in a blob a number's
    span: int  # templates in the view
    shift: int  # the layer's first template within the view
    end: int  # where the next layer's run starts


class TemplateBank(nn.Module):
    r"""The parameters of MixtureEnsembles: templates, of which layers take linear combinations as their weights.

    Args:
        num_templates: T; of a flat blob the number of parameters.
        shape: of each template: `(O, I)` for linear layers, `(O, C / groups, kh, kw)` for convolutions.  `()` makes a
            flat blob, of which a layer of any shape takes contiguous parts as its templates.
        std: standard deviation of the values, which are normal; None is that of torch.nn's layers of this shape,
            :math:`1 / \sqrt{3\,\mathrm{fan\_in}}`.  A blob has no fan-in and needs it.
        device, dtype: as in `torch.nn.Linear`.

    Parameter `templates` `[T, *shape]`.

    A layer that is given a bank refers to it without owning it: register the bank once, next to its layers, as here.

    Example:
        >>> import torch, effens_kernels as ek
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bank = ek.nn.TemplateBank(4, (64, 64))  # 4 templates for both layers of all members
        ...         self.first = ek.nn.MixtureLinear(64, 64, num_members=5, num_templates=3, bank=self.bank)
        ...         self.second = ek.nn.MixtureLinear(64, 64, num_members=5, num_templates=3, bank=self.bank, start=3)
        ...
        ...     def forward(self, x):
        ...         return self.second(self.first(x).relu())
        >>> net = Net()
        >>> net(torch.randn(32, 64)).shape
        torch.Size([5, 32, 64])
        >>> [name for name, _ in net.named_parameters() if "templates" in name]
        ['bank.templates']
    """

    def __init__(
        self,
        num_templates: int,
        shape: Sequence[int] = (),
        *,
        std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("TemplateBank", num_templates=num_templates)
        if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) == 1:
            reject("TemplateBank", "shape", "() or the two or more sizes of a weight", repr(shape))
        for size in shape:
            positive("TemplateBank", shape=size)
        if std is None and not shape:
            reject("TemplateBank", "std", "given for a flat blob", "None")
        self.shape, self.std = tuple(shape), usual_std(shape) if std is None else checked_std("TemplateBank", std)
        self.templates = nn.Parameter(torch.empty(num_templates, *shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.templates, 0.0, self.std)

    def run(self, start: int, count: int, shape: Sequence[int]) -> Run:
        """The place of `count` templates from `start` on, modulo the bank's size.

        It is one view of contiguous memory.  Where a run of templates goes past the end, that is the whole bank; in a
        blob, whose size no template need divide, the run is moved back to the end.
        """
        total = len(self.templates)
        if self.shape:
            start %= total
            end = (start + count) % total
            return Run(start, count, 0, end) if start + count <= total else Run(0, total, start, end)
        size = prod(shape)
        span = min(count, total // size)
        start = min(start % total, total - span * size)
        return Run(start, span, 0, (start + span * size) % total)

    def view(self, start: int, count: int, shape: Sequence[int]) -> Tensor:
        """`[count, *shape]`: templates from `start` on, not copied."""
        length = count if self.shape else count * prod(shape)
        part = self.templates if length == len(self.templates) else self.templates[start : start + length]
        return part if self.shape else part.view(count, *shape)

    def lie_like(self, weight: Tensor) -> None:
        """Take the memory format of a plain weight."""
        if weight.dim() == 4 and not weight.is_contiguous():
            self.to(memory_format=torch.channels_last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateBank:
        """Templates of a convolution go through as [T*O, C, kh, kw], which may become channels_last."""

        def of_four_axes(t: Tensor) -> Tensor:
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.dim() == 5 else fn(t)

        return super()._apply(of_four_axes, recurse)

    def extra_repr(self) -> str:
        return f"num_templates={len(self.templates)}, shape={self.shape}"


def usual_std(shape: Sequence[int]) -> float:
    """Standard deviation of a weight as torch.nn draws it: uniform within 1 / sqrt(fan_in)."""
    return (3 * prod(shape[1:])) ** -0.5


def checked_std(layer: str, std: float) -> float:
    if isinstance(std, bool) or not isinstance(std, (int, float)):
        reject(layer, "std", "a number", repr(std), TypeError)
    if not 0 < std < float("inf"):
        reject(layer, "std", "positive and finite", repr(std))
    return float(std)
