"""MixtureLinear and MixtureConv2d: each member's weight is its own linear combination of shared templates."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mix_templates, mixture_linear
from ..ops._checks import reject
from ..ops.rank1_conv2d.options import Numbers
from ._convolution import Convolution
from ._layout import as_given, checked_activation, layout_repr, members_first, one_layout, one_member, positive

# At the merge: `from ..ops import mix_templates, mixture_conv2d, mixture_linear`, and _mixture_conv2d.py goes.
from ._mixture_conv2d import mixture_conv2d
from .bank import TemplateBank, checked_std, usual_std


class _Mixture(nn.Module):
    """Parameters `coefficients` and `bias`, and what is done with them whatever the product."""

    FEATURES: str  # of one member's input after B, as messages name them
    bank: TemplateBank

    def _construct(
        self,
        shape: tuple[int, ...],
        num_members: int,
        num_templates: int,
        bias: bool,
        bank: TemplateBank | None,
        start: int,
        disjoint: bool,
        std: float | None,
        shared_bias: bool,
        batch_first: bool,
        tiled: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        layer = type(self).__name__
        positive(layer, num_members=num_members, num_templates=num_templates)
        one_layout(layer, batch_first, tiled)
        self.num_members, self.num_templates, self.disjoint = num_members, num_templates, disjoint
        self.shared_bias, self.batch_first, self.tiled, self.shape = shared_bias, batch_first, tiled, shape
        self.std = usual_std(shape) if std is None else checked_std(layer, std)
        count = num_templates * num_members if disjoint else num_templates
        if bank is None:
            if start:
                reject(layer, "start", "0 without a bank", repr(start))
            self.bank = TemplateBank(count, shape, std=self.std, device=device, dtype=dtype)
        else:
            self._check_bank(bank, start)
            device = bank.templates.device if device is None else device
            dtype = bank.templates.dtype if dtype is None else dtype
            object.__setattr__(self, "bank", bank)  # not as a submodule: a state_dict has it where it is registered
        self.run = self.bank.run(start, count, shape)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.coefficients = parameter(num_members, num_templates)
        if bias:
            self.bias = parameter(shape[0]) if shared_bias else parameter(num_members, shape[0])
        else:
            self.register_parameter("bias", None)
        self._reset_own_parameters()

    def _check_bank(self, bank: TemplateBank, start: int) -> None:
        layer, size = type(self).__name__, prod(self.shape)
        if not isinstance(bank, TemplateBank):
            reject(layer, "bank", "None or a TemplateBank", type(bank).__name__, TypeError)
        if isinstance(start, bool) or not isinstance(start, int):
            reject(layer, "start", "an int", repr(start), TypeError)
        if bank.shape not in ((), self.shape):
            reject(layer, "bank", f"of templates {list(self.shape)}, or a flat blob", f"templates {list(bank.shape)}")
        held = len(bank.templates) // (1 if bank.shape else size)
        if held < self.num_templates:
            numbers = "" if bank.shape else f" of {size} numbers in a blob of {len(bank.templates)}"
            reject(layer, "num_templates", f"at most the bank's {held}{numbers}", repr(self.num_templates))

    def reset_parameters(self) -> None:
        """The templates of a bank of its own, then `coefficients` and `bias`."""
        if "bank" in self._modules:
            self.bank.reset_parameters()
        self._reset_own_parameters()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        # Directions at random, of the length that gives weights of standard deviation `std` for any direction:
        # Var(sum_t a_t T_t) = |a|^2 Var(T).
        nn.init.normal_(self.coefficients)
        length = self.coefficients.norm(dim=1, keepdim=True)
        self.coefficients.mul_(self.std / self.bank.std / length)
        if self.bias is not None:
            bound = prod(self.shape[1:]) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def _take(self, layer: nn.Module, spread: float) -> None:
        """Members around a plain layer: its weight is the first template, and the other coefficients' mean is 0."""
        weight = layer.weight.detach()
        self.std = self.bank.std = rms([weight]) or self.std
        self.reset_parameters()
        self.bank.lie_like(weight)
        self.begin_around(weight, 0, spread)
        if layer.bias is not None:
            bias = layer.bias.detach()
            self.bias = nn.Parameter(bias.clone() if self.shared_bias else bias.repeat(self.num_members, 1))
        self.train(layer.training)

    @torch.no_grad()
    def begin_around(self, weight: Tensor, which: int, spread: float) -> None:
        """Put a plain weight in place of the `which`-th template that members combine.

        Its coefficient becomes 1 in all members, and their other ones `spread` times what they are, less the mean over
        the members: the mean of the members' weights is the plain one.
        """
        if isinstance(spread, bool) or not isinstance(spread, (int, float)):
            reject(type(self).__name__, "spread", "a number", repr(spread), TypeError)
        self.bank.view(self.templates_of(0)[which], 1, self.shape)[0] = weight
        self.coefficients.mul_(spread)
        self.coefficients.sub_(self.coefficients.mean(0))
        self.coefficients[:, which] = 1

    # ---------------------------------------------------------------------------------- which templates, how much

    def mixing(self, member: int | None = None) -> tuple[Tensor, Tensor]:
        """`coefficients` `[E, span]` and `templates` `[span, *shape]`, a view of the bank, whose mix the weights are.

        Members that share their templates, without a wrap around the bank's end, use their coefficients as they are.
        For `member`, E is 1.
        """
        start, span, shift, _ = self.run
        coefficients = self.coefficients
        if member is not None:
            member %= self.num_members
            coefficients = coefficients[member : member + 1]
            shift = (shift + member * self.num_templates) % span if self.disjoint else shift
            if shift + self.num_templates <= span:
                start, span, shift = start + shift * self._step(), self.num_templates, 0
        elif self.disjoint:  # [E, E*k], each member's in columns of its own
            coefficients = torch.diag_embed(coefficients.t()).permute(1, 2, 0).flatten(1)
        if shift or coefficients.shape[1] != span:  # templates past the view's end are those from its start on
            past = -(shift + coefficients.shape[1]) % span
            coefficients = F.pad(coefficients, (shift, past)).unflatten(1, (-1, span)).sum(1)
        return coefficients, self.bank.view(start, span, self.shape)

    def templates_of(self, member: int) -> list[int]:
        """Which templates a member combines, in the order of its coefficients; in a blob, where each begins."""
        start, span, shift, _ = self.run
        shift += member % self.num_members * self.num_templates if self.disjoint else 0
        return [start + (shift + k) % span * self._step() for k in range(self.num_templates)]

    def _step(self) -> int:
        """From one template to the next, in the bank's first axis."""
        return 1 if self.bank.shape else prod(self.shape)

    def fold(self, member: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Plain weights `[E, *shape]` and biases `[E, O]`, or those of one member `[*shape]` and `[O]`."""
        weight = mix_templates(*self.mixing(member))
        bias = self.bias if self.bias is None else self.bias.expand(self.num_members, -1)
        if member is None:
            return weight, bias
        return weight.squeeze(0), bias if bias is None else bias[member]

    # -------------------------------------------------------------------------------------------------- as a layer

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layer = type(self).__name__
        if member is not None:
            one = one_member(layer, input, member, self.num_members, self.FEATURES)
            bias = self.bias if self.bias is None or self.shared_bias else self.bias[one]
            return self._product(input, *self.mixing(member), bias).squeeze(0)
        x = members_first(layer, input, self.num_members, self.batch_first, self.FEATURES, self.tiled)
        return as_given(self._product(x, *self.mixing(), self.bias), self.batch_first, self.tiled)

    def _product(self, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _plain(self, member: int) -> nn.Module:
        """torch.nn's layer of one member."""
        raise NotImplementedError

    @torch.no_grad()
    def _filled(self, plain: nn.Module, member: int) -> nn.Module:
        """`plain`, made on the meta device (which draws no random numbers), with the weights of a member."""
        weight, bias = self.fold(member)
        plain.weight = nn.Parameter(weight.clone())
        if bias is not None:
            plain.bias = nn.Parameter(bias.clone())
        return plain.train(self.training)

    def _repr(self) -> str:
        own = "bank" in self._modules
        return (
            f"bias={self.bias is not None}"
            + ("" if own else f", start={self.run.start + self.run.shift}")
            + ", disjoint=True" * bool(self.disjoint)
            + ", shared_bias=True" * (self.bias is not None and bool(self.shared_bias))
        )


class MixtureLinear(_Mixture):
    r"""A linear layer per member, whose weight is its own linear combination of shared templates.

    .. math:: y_e = \mathrm{act}\Bigl(x_e \bigl(\textstyle\sum_t \alpha_{et} T_t\bigr)^\top + b_e\Bigr)

    MixtureEnsembles (Teterwak et al. 2021, "MixtureEnsembles: Leveraging Parameter Sharing for Efficient Ensembles",
    equation 2).

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`; with a bank, device and dtype are the
            bank's unless given.
        num_members: E.
        num_templates: how many templates each member combines.
        bank: None for one of its own, or a :class:`TemplateBank` that layers share, of this layer's shape or flat.  It
            has to be registered where the layers are used: the layer refers to it, and does not list its parameters.
        start: of a shared bank, the first template that this layer combines; its templates follow modulo the bank's
            size.  In a flat blob the first number; there a run that goes past the end is moved back to the end.
        disjoint: members combine different templates, the next in the bank for each, as long as there are any.
        std: of the members' weights at the beginning; None as torch.nn draws them.
        shared_bias: one bias `[O]` for all members.
        activation: fused into the product; None, "relu", "gelu", "silu" or "tanh".
        batch_first: per-member inputs and outputs are `[B, E, ...]` instead of `[E, B, ...]`.
        tiled: inputs and outputs are `[E*B, ...]`, all rows of the first member first, with any axes between rows and
            features; then there is no shared input.

    Parameters `coefficients` `[E, num_templates]`, `bias` `[E, O]` or `[O]`, and `bank.templates` `[T, O, I]` of a bank
    of its own.  Coefficients are drawn as a random direction for each member, of the length that gives weights of
    `std`: length 1 where the bank's templates have it.  Weight decay should leave them out.

    `forward(input, member=None)`: `input` is `[B, I]` (the same rows for every member) or per member; with
    `member=e` that member alone runs, `[B, I]` to `[B, O]`.  `fold()` gives plain weights and biases of the members,
    `[E, O, I]` and `[E, O]`; `fold(e)` those of one.

    Example:
        >>> layer = MixtureLinear(8, 64, num_members=5, num_templates=3, activation="relu")
        >>> layer(torch.randn(32, 8)).shape, layer(torch.randn(32, 8), member=3).shape
        (torch.Size([5, 32, 64]), torch.Size([32, 64]))
        >>> {name: list(p.shape) for name, p in layer.named_parameters()}
        {'coefficients': [5, 3], 'bias': [5, 64], 'bank.templates': [3, 64, 8]}
    """

    FEATURES = "I"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_members: int,
        num_templates: int,
        bias: bool = True,
        *,
        bank: TemplateBank | None = None,
        start: int = 0,
        disjoint: bool = False,
        std: float | None = None,
        shared_bias: bool = False,
        activation: str | None = None,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("MixtureLinear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.activation = checked_activation("MixtureLinear", activation)
        sizes = (out_features, in_features), num_members, num_templates
        layout = shared_bias, batch_first, tiled
        self._construct(*sizes, bias, bank, start, disjoint, std, *layout, device, dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, num_members: int, num_templates: int, *, spread: float = 0.5, **options: object
    ) -> MixtureLinear:
        """Members around the given layer: the mean of their weights is its weight, and each has its bias.

        The first template is the layer's weight, with coefficient 1 for every member; the others are drawn with the
        same root mean square, and their coefficients add up to 0 over the members.

        Args:
            linear: its dtype, device and mode are kept.
            num_templates: with 1, all members begin as the layer.
            spread: how far from it members begin, relative to the size of its weight, about.
            options: keyword arguments of the constructor but bank, start, disjoint, std, bias, device and dtype.
        """
        if not isinstance(linear, nn.Linear):
            reject("MixtureLinear.from_linear", "linear", "a torch.nn.Linear", type(linear).__name__, TypeError)
        _own_bank("MixtureLinear.from_linear", options)
        sizes = linear.in_features, linear.out_features, num_members, num_templates, linear.bias is not None
        layer = cls(*sizes, **options, device=linear.weight.device, dtype=linear.weight.dtype)
        layer._take(linear, spread)
        return layer

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        if self.tiled and member is None and isinstance(input, Tensor) and input.dim() > 2:
            if input.shape[0] % self.num_members == 0:
                return super().forward(input.flatten(0, -2)).unflatten(0, input.shape[:-1])
        return super().forward(input, member)

    def _product(self, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and bias.dim() == 1:
            bias = bias.expand(len(coefficients), -1)
        return mixture_linear(x, coefficients, templates, bias, activation=self.activation)

    def _plain(self, member: int) -> nn.Linear:
        bias = self.bias is not None
        return self._filled(nn.Linear(self.in_features, self.out_features, bias, device="meta"), member)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            f"num_templates={self.num_templates}, "
            + self._repr()
            + (f", activation={self.activation!r}" if self.activation else "")
            + layout_repr(self.batch_first, self.tiled)
        )


class MixtureConv2d(_Mixture, Convolution):
    r"""A convolution per member, whose weight is its own linear combination of shared templates.

    MixtureEnsembles (Teterwak et al. 2021, equation 2), as :class:`MixtureLinear`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `torch.nn.Conv2d`; with a bank, device and dtype are the bank's unless given.
        num_members, num_templates, bank, start, disjoint, std, shared_bias, batch_first, tiled: as in
            :class:`MixtureLinear`.

    Parameters `coefficients` `[E, num_templates]`, `bias` `[E, O]` or `[O]`, and `bank.templates`
    `[T, O, C / groups, kh, kw]` of a bank of its own, drawn as those of :class:`MixtureLinear`.

    `forward(input, member=None)`: `input` is `[B, C, H, W]` (the same images for every member) or per member; with
    `member=e` that member alone runs, `[B, C, H, W]` to `[B, O, H', W']`.  `fold()` gives the weights and biases of E
    plain convolutions, `[E, O, C / groups, kh, kw]` and `[E, O]`; `fold(e)` those of one.

    Example:
        >>> layer = MixtureConv2d(3, 16, 3, num_members=5, num_templates=4, padding=1)
        >>> layer(torch.randn(32, 3, 28, 28)).shape, layer(torch.randn(32, 3, 28, 28), member=3).shape
        (torch.Size([5, 32, 16, 28, 28]), torch.Size([32, 16, 28, 28]))
    """

    FEATURES = "C, H, W"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Numbers,
        num_members: int,
        num_templates: int,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bank: TemplateBank | None = None,
        start: int = 0,
        disjoint: bool = False,
        std: float | None = None,
        shared_bias: bool = False,
        batch_first: bool = False,
        tiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._read_options(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        sizes = self._weight_shape(), num_members, num_templates
        layout = shared_bias, batch_first, tiled
        self._construct(*sizes, bias, bank, start, disjoint, std, *layout, device, dtype)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, num_members: int, num_templates: int, *, spread: float = 0.5, **options: object
    ) -> MixtureConv2d:
        """Members around the given convolution, as :meth:`MixtureLinear.from_linear`.

        Args:
            conv: its options, dtype, device, memory format and mode are kept.
            num_templates, spread: as in :meth:`MixtureLinear.from_linear`.
            options: keyword arguments of the constructor that `torch.nn.Conv2d` has not, but bank, start, disjoint and
                std.
        """
        if not isinstance(conv, nn.Conv2d):
            reject("MixtureConv2d.from_conv", "conv", "a torch.nn.Conv2d", type(conv).__name__, TypeError)
        _own_bank("MixtureConv2d.from_conv", options)
        how = conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, num_members, num_templates
        layer = cls(*sizes, *how, **options, device=conv.weight.device, dtype=conv.weight.dtype)
        layer._take(conv, spread)
        return layer

    def _product(self, x: Tensor, coefficients: Tensor, templates: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = self._padded(x)
        return mixture_conv2d(x, coefficients, templates, bias, self.stride, padding, self.dilation, self.groups)

    def _plain(self, member: int) -> nn.Conv2d:
        how = self.stride, self.padding, self.dilation, self.groups, self.bias is not None, self.padding_mode
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, *how, device="meta")
        return self._filled(conv, member)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_members={self.num_members}, num_templates={self.num_templates}, "
            + self._options_repr()
            + self._repr()
            + layout_repr(self.batch_first, self.tiled)
        )


def rms(weights: list[Tensor]) -> float | None:
    """Root mean square of all numbers of the weights; None where they have no values, or none but zeros."""
    if any(weight.is_meta for weight in weights):
        return None
    total = sum(weight.detach().double().square().sum().item() for weight in weights)
    return (total / sum(weight.numel() for weight in weights)) ** 0.5 or None


def _own_bank(layer: str, options: dict[str, object]) -> None:
    for name in ("bank", "start", "disjoint", "std"):
        if name in options:
            reject(layer, name, "left out: the layer gets a bank of its own around the given weight", "it", TypeError)
