"""Deep sub-ensembles: members share the model up to a module, and have the rest each of their own."""

from __future__ import annotations

import copy
from math import isfinite

import torch
from torch import Tensor, nn

from ..ops._checks import reject
from ._alike import check_one
from ._ensemble import Ensemble
from ._summary import Summary, of_parts
from ._surgery import Site, Sites
from .deep import check_reset, reset
from .stack import StackedEnsemble, assembled, member_of


class SubEnsemble(Ensemble):
    r"""A model with one trunk and a head for each member.

    .. math:: y_e = h(g(x;\, \theta);\, \theta_e), \qquad e = 1 \dots E

    Deep Sub-Ensembles (Valdenegro-Toro 2019, "Deep Sub-Ensembles for Fast Uncertainty Estimation in Image
    Classification", section 2), made by `effens_kernels.convert(model, "sub_ensemble", num_members, split=...)`.  The
    module at `split` and all that are registered after it are the head h, each member's own; modules before it, and the
    parameters that belong to a module around `split` itself, are the trunk g, which is the plain model's.

    The model's forward code runs as it is, by `torch.func.vmap` as in :class:`StackedEnsemble`: whatever does not
    depend on a member's own parameters is computed once, on `[B, ...]`, and everything else for all members in the same
    calls.  So the code may do anything between trunk and heads, and heads may use whatever the trunk has computed.

    `forward(*inputs, per_member=False, member=None, **named)` is that of :class:`StackedEnsemble`, from `[B, ...]`, or
    `[E, B, ...]` with `per_member=True`, to `[E, B, ...]`.  A trunk that sees rows of each member runs on all of these,
    and cannot update running statistics of BatchNorm: that is an error in training, unless they are frozen.  Dropout
    in the trunk drops the same for all members, and dropout of a member's own, or of what differs already, does not.

    Options of `convert`:
        split: the path of the module at which members begin, as in `model.named_modules()`.  Without it, members own
            just the modules that `include` names.
        keep_weights: heads begin around the plain model's instead of with fresh parameters, drawn as its modules do.
        spread: with `keep_weights`, how far heads begin from the plain model's, relative to its weights: normal noise
            on weights, none on biases and norms.
        freeze_trunk: the trunk's parameters have `requires_grad=False`, and its modules stay in eval mode, so that
            running statistics do not change and nothing is dropped there (the paper freezes a trained trunk).

    `exclude` leaves modules behind `split` to be shared.

    Attributes:
        model: a :class:`StackedEnsemble`; its parameters have the model's names, and `[E, ...]` where they are members'
            own.
        split: where members begin.
        trunk: paths of the modules that hold nothing of a member's own, without those inside them.
        freeze_trunk: whether these stay in eval mode.

    Raises:
        RuntimeError: see :class:`StackedEnsemble`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> layers = [torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU()]
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "sub_ensemble", num_members=5, split="2")
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([5, 32, 4])
        >>> ensemble.model.get_parameter("0.weight").shape, ensemble.model.get_parameter("2.weight").shape
        (torch.Size([64, 8]), torch.Size([5, 64, 64]))
        >>> ensemble.summary().rows
        (('trunk', 576, 0), ("heads, from '2'", 0, 4420))
    """

    def __init__(
        self, model: StackedEnsemble, split: str | None, trunk: list[str], freeze_trunk: bool, plain: int
    ) -> None:
        super().__init__(model, model.num_members)
        self.split, self.trunk, self.freeze_trunk, self.plain = split, trunk, freeze_trunk, plain

    def forward(self, *inputs: object, per_member: bool = False, **named: object) -> object:
        return self.model(*inputs, per_member=per_member, **named)

    def train(self, mode: bool = True) -> SubEnsemble:
        super().train(mode)
        if self.freeze_trunk:
            for path in self.trunk:
                self.model.get_submodule(path).eval()
        return self

    def to(self, *args: object, **kwargs: object) -> SubEnsemble:
        """As in torch.nn, with a memory format that of each member's tensors."""
        self.model.to(*args, **kwargs)
        return self

    def _member(self, member: int) -> nn.Module:
        model = member_of(self.model, member)
        for module in model.modules():
            module.__class__ = PLAIN.get(type(module), type(module))
        return model

    def summary(self) -> Summary:
        """Parameters of the trunk, which members share, and of a head."""
        shared = {id(p): p.numel() for n, p in self.model._state("_parameters").items() if n in self.model.shared}
        own = sum(p.numel() for p in self.parameters() if id(p) not in shared) // self.num_members
        heads = "heads" if self.split is None else f"heads, from {self.split!r}"
        parts = ("trunk", sum(shared.values()), 0), (heads, 0, own)
        return of_parts(f"Sub-ensemble of {self.num_members} members", parts, self.num_members, self.plain)


class _MemberDropout:
    """Dropout that differs between members though its input does not; as modules of torch.nn, it parts them there."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        axes = AXES[type(self)]
        if axes and input.dim() != axes + 2:
            return super().forward(input)
        kept = torch.full_like(input.detach()[(..., *(slice(0, 1),) * axes)], 1.0 - self.p)
        return input * (torch.bernoulli(kept) / (1.0 - self.p if self.p < 1 else 1.0))


class MemberDropout(_MemberDropout, nn.Dropout):
    pass


class MemberDropout1d(_MemberDropout, nn.Dropout1d):
    pass


class MemberDropout2d(_MemberDropout, nn.Dropout2d):
    pass


class MemberDropout3d(_MemberDropout, nn.Dropout3d):
    pass


AXES = {MemberDropout: 0, MemberDropout1d: 1, MemberDropout2d: 2, MemberDropout3d: 3}  # that are dropped together
PLAIN = {kind: kind.__mro__[2] for kind in AXES}
OWN = {plain: kind for kind, plain in PLAIN.items()}


def convert(
    sites: Sites,
    num_members: int,
    split: str | None = None,
    keep_weights: bool = False,
    spread: float = 0.1,
    freeze_trunk: bool = False,
) -> SubEnsemble:
    """The method "sub_ensemble"; its options are those of :class:`SubEnsemble`."""
    check_spread(spread)
    check_one("convert", "model", sites.model)
    own = sites.meant = _own(sites, split)
    mine = {id(site.module) for site in own}
    common = _tensors([site for site in sites.all if id(site.module) not in mine])
    for site in own:
        for name, tensor in (*site.module._parameters.items(), *site.module._buffers.items()):
            if tensor is not None and id(tensor) in common:
                expected = "of a head whose parameters are its own (exclude what is tied, to share it as it is)"
                reject("convert", "model", expected, f"{name} of {site} tied to {common[id(tensor)][1]}")

    if not any(_state(site.module) for site in own):
        reject("convert", "split", "a module with parameters, or one before such", "only modules without")
    for site in () if keep_weights else own:
        check_reset(site, "keep_weights=True begins at the model's, exclude")
    trunk = _whole([site for site in sites.all if id(site.module) not in mine], mine)

    memo: dict[int, object] = {}
    base = copy.deepcopy(sites.model, memo)
    shared = [memo[number] for number in common]
    if freeze_trunk:
        for tensor in shared:
            tensor.requires_grad_(False)
        for path in trunk:
            base.get_submodule(path).eval()
    members = [copy.deepcopy(base, {id(tensor): tensor for tensor in shared}) for _ in range(num_members)]
    for member in members:
        if keep_weights:
            _disturb([member.get_submodule(site.paths[0]) for site in own], spread)
        else:
            reset(member, sites)
    plain = sum(p.numel() for p in sites.model.parameters())
    for site in own:
        module = members[0].get_submodule(site.paths[0])
        module.__class__ = OWN.get(type(module), type(module))
    return SubEnsemble(assembled(members, "different", shared), split, trunk, freeze_trunk, plain)


def check_spread(spread: float) -> None:
    if isinstance(spread, bool) or not isinstance(spread, (int, float)):
        reject("convert", "spread", "a number", repr(spread), TypeError)
    if not isfinite(spread) or spread < 0:
        reject("convert", "spread", "at least 0", repr(spread))


def _own(sites: Sites, split: str | None) -> list[Site]:
    """The modules of which each member has one."""
    expected = "the path of a module in the model"
    if split is None:
        if len(sites.meant) == len(sites.all):
            reject("convert", "split", f"{expected} (or include, which of them members own)", "None")
        return sites.meant
    if not isinstance(split, str):
        reject("convert", "split", expected, repr(split), TypeError)
    at = next((n for n, site in enumerate(sites.all) if split in site.paths and split), None)
    if at is None:
        reject("convert", "split", expected, repr(split))
    after = {id(site.module) for site in sites.all[at:]}
    return [site for site in sites.meant if id(site.module) in after]


def _state(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _tensors(sites: list[Site]) -> dict[int, tuple[Tensor, Site]]:
    return {id(tensor): (tensor, site) for site in sites for tensor in _state(site.module)}


def _whole(shared: list[Site], own: set[int]) -> list[str]:
    """The outermost modules without any part that is members' own."""
    whole = [site for site in shared if not any(id(part) in own for part in site.module.modules())]
    inside = {id(part) for site in whole for part in site.module.modules() if part is not site.module}
    return [site.paths[0] for site in whole if id(site.module) not in inside]


@torch.no_grad()
def _disturb(modules: list[nn.Module], spread: float) -> None:
    weights = {id(p): p for module in modules for p in module._parameters.values() if p is not None and p.dim() > 1}
    for weight in weights.values():
        if weight.is_floating_point():
            weight += spread * weight.square().mean().sqrt() * torch.randn_like(weight)
