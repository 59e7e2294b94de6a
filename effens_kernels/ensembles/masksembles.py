"""Masksembles: one model whose members each keep channels of their own, by masks that are drawn once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._checks import reject
from ._ensemble import Ensemble
from ._summary import Summary
from ._surgery import Sites, replaced
from .mc_dropout import DROPOUTS


class MasksemblesEnsemble(Ensemble):
    r"""A model whose dropout layers are replaced by masks, a fixed one for each member.

    .. math:: y_e = f(x;\, \theta, m_e), \qquad m_e \in \{0, 1\}^C, \qquad e = 1 \dots E

    Masksembles (Durasov et al. 2021, "Masksembles for Uncertainty Estimation"), made by
    `effens_kernels.convert(model, "masksembles", num_members, example=x)`.  Each mask keeps M of a layer's C
    channels, drawn among about S M positions, of which those that no mask keeps are left out: the
    greater the scale S, the fewer channels any two members share.  With S = 1 members are one model; masks without
    overlap would be an ensemble of smaller models.  Nothing is rescaled, as masks are the same in training and in
    prediction.

    Channels are the last axis of an `nn.Dropout`'s rows of up to two axes, and otherwise the first after the rows.

    In training the paper gives each member a part of the batch: `ensemble(x.unflatten(0, (E, -1)), per_member=True)`.
    BatchNorm layers and all parameters are shared.

    Options of `convert`:
        example: rows `[B, ...]`, or a tuple of all inputs, that the model takes: it runs on them once, to see how many
            channels each dropout layer has.
        scale: S, at least 1.
        generator: of the random numbers, on the CPU; None: PyTorch's own.

    `member(e)` is a model of the original classes but for its masks, `[C]`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(), torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "masksembles", num_members=4, example=torch.randn(2, 8), scale=2.0)
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([4, 32, 4])
        >>> kept = ensemble.model[1].masks  # [E, C]
        >>> bool((kept.sum(1) == kept[0].sum()).all() and kept.any(0).all())
        True
    """

    def __init__(self, model: nn.Module, num_members: int, scale: float) -> None:
        super().__init__(model, num_members)
        self.scale = scale

    def summary(self) -> Summary:
        """Parameters, all of which members share, and how many channels each keeps."""
        count = sum(p.numel() for p in self.parameters())
        masks = {name: m.masks for name, m in self.model.named_modules() if isinstance(m, MemberMask)}
        return Summary(
            f"Masksembles of {self.num_members} members",
            ("part", "shared", "per member"),
            (("the model", count, 0),),
            ("all", count, 0),
            tuple(f"{name}: each keeps {int(m[0].sum())} of {m.shape[1]} channels" for name, m in masks.items()),
        )


class MemberMask(nn.Module):
    """Rows `[E*B, ...]`, those of the first member first, of which each member keeps the channels of its mask.

    Example:
        >>> import torch
        >>> mask = MemberMask(torch.eye(2), axis=1)
        >>> mask(torch.ones(2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, masks: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis  # of the channels, in the rows
        self.register_buffer("masks", masks)  # [E, C], or [C] of one member alone

    def forward(self, input: Tensor) -> Tensor:
        masks = self.masks if self.masks.dim() == 2 else self.masks.unsqueeze(0)
        members, channels = masks.shape
        if input.dim() <= self.axis or input.shape[self.axis] != channels or input.shape[0] % members:
            reject("MemberMask", "input", f"[E*B, ...] of E={members} members and C={channels} channels", input)
        x = input.unflatten(0, (members, input.shape[0] // members))
        shape = [members, *(channels if axis == self.axis + 1 else 1 for axis in range(1, x.dim()))]
        return (x * masks.view(shape).to(x.dtype)).flatten(0, 1)

    def _plain(self, member: int) -> nn.Module:
        return MemberMask(self.masks[member].clone(), self.axis)

    def extra_repr(self) -> str:
        return f"masks={list(self.masks.shape)}, axis={self.axis}"


def draw_masks(num_members: int, channels: int, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """Masks [E, C] of as many ones each, so that every channel is in at least one.

    M of about S M positions are expected to leave S M (1 - (1 - 1/S)^E) in use; positions are added or taken away until
    they are C.

    Example:
        >>> bool((draw_masks(3, 10, 1.0) == 1).all())  # all that there is
        True
    """
    kept = round(channels / (scale * (1 - (1 - 1 / scale) ** num_members)))
    kept = max(kept, -(-channels // num_members))
    positions = round(kept * scale)
    for _ in range(10_000):
        drawn = torch.rand(num_members, positions, generator=generator).topk(kept).indices
        masks = torch.zeros(num_members, positions).scatter_(1, drawn, 1.0)
        masks = masks[:, masks.any(0)]
        if masks.shape[1] == channels:
            return masks
        positions = max(kept, positions + (1 if masks.shape[1] < channels else -1))
    reject("convert", "scale", f"such that {num_members} masks fit {channels} channels", repr(scale))


def convert(
    sites: Sites,
    num_members: int,
    example: Tensor | Sequence[object] | None = None,
    scale: float = 2.0,
    generator: torch.Generator | None = None,
) -> MasksemblesEnsemble:
    """The method "masksembles"; its options are those of :class:`MasksemblesEnsemble`."""
    if not isinstance(example, (Tensor, tuple, list)):
        reject("convert", "example", "input that the model takes, to count channels", example, TypeError)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        reject("convert", "scale", "a number", repr(scale), TypeError)
    if not 1 <= scale < float("inf"):
        reject("convert", "scale", "at least 1, and finite", repr(scale))
    chosen = [site for site in sites.meant if isinstance(site.module, DROPOUTS)]
    if not chosen:
        reject("convert", "model", "with dropout layers to replace", "one without")
    seen = _inputs(sites.model, [site.paths[0] for site in chosen], example)
    masks: dict[nn.Module, nn.Module] = {}
    for site in chosen:
        path = site.paths[0]
        if path not in seen:
            reject("convert", "example", f"one that reaches the dropout layer at {site}", "one that does not")
        x = seen[path]
        axis = x.dim() - 1 if isinstance(site.module, nn.Dropout) and x.dim() <= 3 else 1
        if x.dim() < 2 or x.shape[axis] == 0:
            reject("convert", "example", f"[B, ...] with channels at {site}", x)
        drawn = draw_masks(num_members, x.shape[axis], float(scale), generator)
        masks[site.module] = MemberMask(drawn.to(x.device, x.dtype), axis).train(site.module.training)
    return MasksemblesEnsemble(replaced(sites.model, masks), num_members, float(scale))


@torch.no_grad()
def _inputs(model: nn.Module, paths: list[str], example: Tensor | Sequence[object]) -> dict[str, Tensor]:
    """What the modules at some paths get; those that are reached."""
    model = copy.deepcopy(model).eval()  # which keeps the running statistics, too, of the model as it was
    seen: dict[str, Tensor] = {}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, path=path: seen.update({path: inputs[0]})
        )
    model(*([example] if isinstance(example, Tensor) else example))
    return seen
