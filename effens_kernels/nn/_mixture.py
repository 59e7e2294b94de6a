"""What mixture layers share: which templates of a bank they combine, how they begin, and who runs."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mix_templates
from ..ops._checks import reject
from ._layout import as_given, members_first, one_layout, one_member, positive
from .bank import TemplateBank, checked_std, usual_std


class Mixture(nn.Module):
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


def rms(weights: list[Tensor]) -> float | None:
    """Root mean square of all numbers of the weights; None where they have no values, or none but zeros."""
    if any(weight.is_meta for weight in weights):
        return None
    total = sum(weight.detach().double().square().sum().item() for weight in weights)
    return (total / sum(weight.numel() for weight in weights)) ** 0.5 or None
