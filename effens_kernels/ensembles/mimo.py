"""MIMO: members inside one network, which takes the inputs of all at once and has a head for each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..nn._layout import positive
from ..ops import grouped_linear
from ..ops._checks import reject
from ._ensemble import Ensemble
from ._summary import Summary, of_parts
from ._surgery import Site, Sites, check_layer, replaced
from .sub_ensemble import check_spread


class MIMOEnsemble(Ensemble):
    r"""One network with M inputs and M outputs.

    .. math:: (y_1, \dots, y_M) = f(x_1, \dots, x_M), \qquad
              z = \sum_m W_m x_m + b, \quad y_m = V_m h(z) + c_m

    MIMO (Havasi et al. 2021, "Training independent subnetworks for robust prediction", section 2), made by
    `effens_kernels.convert(model, "mimo", num_members, ...)`.  The model's first layer is widened over its inputs, W
    `[O, M*I, ...]`, and its last one over heads, V `[M*O, I, ...]`.  Everything between, h, is the plain model's, runs
    once on `[B, ...]`, and is trained to hold M independent members.

    `forward(x)` gives every input the same rows, as for predictions: `[B, ...]` to `[M, B, ...]`.  Training takes rows
    `[M, B, ...]` of :func:`mimo_batch`, with `per_member=True`.  Code before the first layer and after the last sees
    the rows of all inputs, `[M*B, ...]`, and code between them `[B, ...]`.  Other inputs of the model come with rows
    `[M*B, ...]` too, so they have to be used before the first layer or after the last.

    Weights are kept: each W_m is the first layer's weight / M with noise on it that sums to 0 over m, and each V_m is
    the last layer's.  So before training, with repeated inputs, every head gives what the plain model gives.

    `member(m)` is a plain model that gives head m for repeated inputs: its first layer has the sum of the W_m.

    Options of `convert`:
        first, last: paths of the layers that are widened, Linear, Conv1d or Conv2d, with `groups=1`.  Without them, the
            first and the last module that have parameters and no modules inside, in the order of registration.
        keep_weights: False draws both layers afresh, as their types do, and keeps what is between them.
        spread: with `keep_weights`, how far the W_m begin from each other, relative to the plain weight.

    Attributes:
        model: the converted model, which maps `[M*B, ...]` to `[M*B, ...]`.
        num_members: M.

    Raises:
        ValueError: a per-member input is not `[M, B, ...]`; the first layer runs after the last, or a result is not of
            the last.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "mimo", num_members=3)
        >>> x = torch.randn(32, 8)
        >>> torch.allclose(ensemble(x)[1], model(x), atol=1e-5)
        True
        >>> x, y = ek.ensembles.mimo_batch(x, torch.randint(4, (32,)), 3)
        >>> ensemble(x, per_member=True).shape
        torch.Size([3, 32, 4])
        >>> ensemble.summary().total
        ('all', 64, 772)
    """

    def __init__(self, model: nn.Module, num_members: int, order: _Order, plain: int) -> None:
        super().__init__(model, num_members)
        self.order, self.plain = order, plain

    def forward(self, *inputs: object, per_member: bool = False, **named: object) -> object:
        self.order.joined = False
        return super().forward(*inputs, per_member=per_member, **named)

    def summary(self) -> Summary:
        """Parameters of the widened layers and of what is between them."""
        first, last = (next(m for m in self.model.modules() if isinstance(m, kind)) for kind in (_First, _Last))
        count, bias = self.num_members, 0 if first.bias is None else first.bias.numel()
        head = sum(p.numel() for p in last.parameters()) // count
        rest = sum(p.numel() for p in self.parameters()) - first.weight.numel() - bias - count * head
        parts = ("first layer", bias, first.weight.numel() // count), ("between", rest, 0), ("last layer", 0, head)
        return of_parts(f"MIMO ensemble of {count} members", parts, count, self.plain)


class _Order:
    """Whether the first layer has run, in this pass; the first and the last layer both know."""

    joined = False


class _Widened:
    """A layer of torch.nn for M inputs or outputs, and as it is for one."""

    def widen(self, num_members: int, order: _Order) -> None:
        self.num_members, self.order = num_members, order

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_members={self.num_members}"


class _First(_Widened):
    """[M*B, I, ...] to [B, O, ...], with weight [O, M*I, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        count = self.num_members
        conv = not isinstance(self, nn.Linear)
        if not (input.dim() == self.weight.dim() if conv else input.dim() > 1) or input.shape[0] % count:
            reject("MIMOEnsemble", "input of the first layer", f"[M*B, ...] with M={count}", input)
        self.order.joined = True
        rows = input.unflatten(0, (count, input.shape[0] // count))
        return super().forward(torch.cat(rows.unbind(0), dim=1 if conv else -1))  # keeps channels_last

    def _plain(self, member: int) -> nn.Module:
        weight = self.weight.unflatten(1, (self.num_members, -1)).sum(1)
        return _resized(PLAIN[type(self)], self, weight, self.bias)


class _Last(_Widened):
    """[B, I, ...] to [M*B, O, ...], with weight [M*O, I, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.order.joined:
            expected = "a layer that runs before the last (first= and last= name others)"
            reject("MIMOEnsemble", "first", expected, "one that does not")
        count = self.num_members
        if isinstance(self, nn.Linear):
            weight = self.weight.unflatten(0, (count, -1))
            bias = None if self.bias is None else self.bias.unflatten(0, (count, -1))
            y = grouped_linear(input.flatten(0, -2), weight, bias)
            return y.reshape(count * input.shape[0], *input.shape[1:-1], weight.shape[1])
        return torch.cat(super().forward(input).chunk(count, 1))

    def _plain(self, member: int) -> nn.Module:
        weight = self.weight.unflatten(0, (self.num_members, -1))[member]
        bias = None if self.bias is None else self.bias.unflatten(0, (self.num_members, -1))[member]
        return _resized(PLAIN[type(self)], self, weight, bias)


class FirstLinear(_First, nn.Linear):
    pass


class FirstConv1d(_First, nn.Conv1d):
    pass


class FirstConv2d(_First, nn.Conv2d):
    pass


class LastLinear(_Last, nn.Linear):
    pass


class LastConv1d(_Last, nn.Conv1d):
    pass


class LastConv2d(_Last, nn.Conv2d):
    pass


FIRST = {nn.Linear: FirstLinear, nn.Conv1d: FirstConv1d, nn.Conv2d: FirstConv2d}
LAST = {nn.Linear: LastLinear, nn.Conv1d: LastConv1d, nn.Conv2d: LastConv2d}
PLAIN = {widened: plain for table in (FIRST, LAST) for plain, widened in table.items()}


def convert(
    sites: Sites,
    num_members: int,
    first: str | None = None,
    last: str | None = None,
    keep_weights: bool = True,
    spread: float = 0.5,
) -> MIMOEnsemble:
    """The method "mimo"; its options are those of :class:`MIMOEnsemble`."""
    check_spread(spread)
    begin, end = _layer(sites, "first", first, sites.meant), _layer(sites, "last", last, sites.meant[::-1])
    if begin is end:
        reject("convert", "model", "of a first and a last layer", f"one, {type(end.module).__name__} at {end}")
    sites.refuse_ties([begin, end])
    order = _Order()
    with torch.no_grad():
        inputs = _resized(FIRST[type(begin.module)], begin.module, _tiled(begin.module.weight, num_members, spread))
        heads = _resized(
            LAST[type(end.module)],
            end.module,
            *(None if p is None else torch.cat([p] * num_members) for p in (end.module.weight, end.module.bias)),
        )
    for layer in (inputs, heads):
        layer.widen(num_members, order)
        if not keep_weights:
            layer.reset_parameters()
    model = replaced(sites.model, {begin.module: inputs, end.module: heads})
    return MIMOEnsemble(model, num_members, order, sum(p.numel() for p in sites.model.parameters()))


def _layer(sites: Sites, option: str, path: str | None, candidates: Iterable[Site]) -> Site:
    names = ", ".join(kind.__name__ for kind in FIRST)
    if path is None:
        site = next((site for site in candidates if _has_parameters(site.module)), None)
        if site is None:
            reject("convert", "model", f"with layers to widen ({names})", "one without")
        expected = f"a {names} before all other modules with parameters, or named ({option}='path')"
        expected = expected.replace("before", "after") if option == "last" else expected
    else:
        if not isinstance(path, str):
            reject("convert", option, "the path of a module in the model", repr(path), TypeError)
        site = next((site for site in sites.all if path in site.paths), None)
        if site is None:
            reject("convert", option, "the path of a module in the model", repr(path))
        expected = f"the path of a {names}"
    if type(site.module) not in FIRST:
        reject("convert", option, expected, f"{type(site.module).__name__} at {site}")
    check_layer(site)
    if getattr(site.module, "groups", 1) != 1:
        kind = type(site.module).__name__
        reject("convert", option, "a layer of groups=1", f"{kind} at {site} of groups={site.module.groups}")
    return site


def _has_parameters(module: nn.Module) -> bool:
    """As a layer has; where those of a module around others are used, its place does not tell."""
    return not module._modules and any(p is not None for p in module._parameters.values())


def _tiled(weight: Tensor, count: int, spread: float) -> Tensor:
    """[O, M*I, ...], whose parts sum to the weight [O, I, ...]."""
    noise = torch.randn(count, *weight.shape, device=weight.device, dtype=weight.dtype)
    noise = (noise - noise.mean(0)) * (spread * weight.square().mean().sqrt())
    return torch.cat(((weight + noise) / count).unbind(0), dim=1)


def _resized(kind: type[nn.Module], layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A layer of `kind` with copies of these parameters, and in everything else like `layer`."""
    bias = layer.bias if bias is None else bias
    sizes = weight.shape[1], weight.shape[0]
    options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    if not isinstance(layer, nn.Linear):
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
            options[name] = getattr(layer, name)
    new = nn.utils.skip_init(kind, *sizes, **options)
    new.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    return new.train(layer.training)


def mimo_batch(
    x: Tensor,
    y: Tensor,
    num_members: int,
    *,
    input_repetition: float = 0.0,
    batch_repetition: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch for each member of a :class:`MIMOEnsemble`, as it is trained.

    Every member sees each row `batch_repetition` times, in an order of its own, so that what the network is given at
    once is independent; a share of rows is the same for all members (Havasi et al. 2021, "Training independent
    subnetworks for robust prediction": input repetition and batch repetition).  So the mean of the members' losses
    counts each row as often as any other.

    Args:
        x: rows `[B, ...]`, of any dtype, on any device.
        y: their targets `[B, ...]`.
        num_members: M.
        input_repetition: rho, the share of the B*R rows that all members see together, from 0 (independent) to 1.
        batch_repetition: R, how often a row is in the batch, which lowers the noise of members' independent orders.
        generator: of random numbers; without one, those of x's device are used.

    Returns:
        x `[M, B*R, ...]` and y `[M, B*R, ...]`.

    Raises:
        TypeError: x or y is no tensor, a number is of another type.
        ValueError: x and y have different numbers of rows; a number is out of range.

    Example:
        >>> import torch, effens_kernels as ek
        >>> x, y = torch.randn(32, 8), torch.randint(4, (32,))
        >>> x, y = ek.ensembles.mimo_batch(x, y, num_members=3, batch_repetition=2)
        >>> x.shape, y.shape
        (torch.Size([3, 64, 8]), torch.Size([3, 64]))
    """
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            reject("mimo_batch", name, "a torch.Tensor", tensor, TypeError)
        if tensor.dim() == 0:
            reject("mimo_batch", name, "[B, ...]", tensor)
    if y.shape[0] != x.shape[0]:
        reject("mimo_batch", "y", f"[B={x.shape[0]}, ...] like x", y)
    positive("mimo_batch", num_members=num_members, batch_repetition=batch_repetition)
    if isinstance(input_repetition, bool) or not isinstance(input_repetition, (int, float)):
        reject("mimo_batch", "input_repetition", "a number", repr(input_repetition), TypeError)
    if not 0.0 <= input_repetition <= 1.0:
        reject("mimo_batch", "input_repetition", "in [0, 1]", repr(input_repetition))
    if generator is not None and not isinstance(generator, torch.Generator):
        reject("mimo_batch", "generator", "a torch.Generator", generator, TypeError)
    device = x.device if generator is None else generator.device

    def shuffled(size: int) -> Tensor:
        return torch.randperm(size, generator=generator, device=device)

    rows = shuffled(x.shape[0]).repeat(batch_repetition)
    own = round(len(rows) * (1.0 - input_repetition))
    index = torch.stack([torch.cat([rows[:own][shuffled(own)], rows[own:]]) for _ in range(num_members)])
    return x[index.to(x.device)], y[index.to(y.device)]
