"""Dropout of members that have probabilities of their own, in the place of torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class _OwnDropout(nn.Module):
    """With p as a buffer: of one member in its code, `[E]` in the ensemble; not in a state_dict, as in torch.nn."""

    AXES: ClassVar[int] = 0  # the last ones, which are dropped together

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        kept = 2 if self.AXES == 2 else input.dim() - self.AXES  # Dropout2d takes the axes behind two
        shape = (*input.shape[:kept], *(1 for _ in input.shape[kept:]))
        noise = torch.rand(shape, dtype=torch.float32, device=input.device) >= self.p.float()
        scale = torch.where(self.p < 1, 1 / (1 - self.p), 0.0)  # p = 1 gives zeros, and no NaN to gradients
        noise = noise * scale.to(input.dtype)
        return input.mul_(noise) if self.inplace else input * noise

    def extra_repr(self) -> str:
        return f"p=[E], inplace={self.inplace}"

    def _get_name(self) -> str:
        return PLAIN[type(self)].__name__


class OwnDropout(_OwnDropout, nn.Dropout):
    pass


class OwnDropout1d(_OwnDropout, nn.Dropout1d):
    AXES = 1


class OwnDropout2d(_OwnDropout, nn.Dropout2d):
    AXES = 2


class OwnDropout3d(_OwnDropout, nn.Dropout3d):
    AXES = 3


PLAIN = {own: own.__mro__[2] for own in (OwnDropout, OwnDropout1d, OwnDropout2d, OwnDropout3d)}
OWN = {plain: own for own, plain in PLAIN.items()}


def give_own(ensemble: nn.Module, plain: nn.Module, models: Sequence[nn.Module]) -> None:
    """Dropout in the members' code and in the ensemble takes the members' probabilities, where they differ."""
    for path, module in plain.named_modules():
        own = OWN.get(type(module))
        rates = [model.get_submodule(path).p for model in models] if own else []
        if len(set(rates)) < 2:
            continue
        module.__class__ = own
        del module.p
        values = torch.tensor(rates, dtype=torch.float64, device=_device(models[0]))
        module.register_buffer("p", torch.empty((), dtype=torch.float64, device="meta"), persistent=False)
        ensemble.get_submodule(path).register_buffer("p", values, persistent=False)


def take_own(member: nn.Module) -> nn.Module:
    """In place; PyTorch's dropout again, with the probability of this member."""
    for module in member.modules():
        if type(module) in PLAIN:
            p = module.p.item()
            del module.p
            module.__class__ = PLAIN[type(module)]
            module.p = p
    return member


def _device(model: nn.Module) -> torch.device:
    return next(t.device for t in (*model.parameters(), *model.buffers()))
