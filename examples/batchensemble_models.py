"""Four ways to have an ensemble of MLPs with two hidden layers; all map rows [B, I] to logits [E, B, classes]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import effens_kernels as ek


class LoopEnsemble(nn.Module):
    """Members of their own, one after the other."""

    def __init__(self, inputs: int, hidden: int, classes: int, members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
            )
            for _ in range(members)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members])


class BroadcastLinear(nn.Module):
    """BatchEnsemble as tutorials write it: every scale a pass over memory, every member a copy of the rows."""

    def __init__(self, inputs: int, outputs: int, members: int, std: float) -> None:
        super().__init__()
        plain = nn.Linear(inputs, outputs)
        self.weight, self.bias = plain.weight, nn.Parameter(torch.zeros(outputs))
        self.r = nn.Parameter(1 + std * torch.randn(members, inputs))
        self.s = nn.Parameter(1 + std * torch.randn(members, outputs))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.unsqueeze(0).expand(len(self.r), -1, -1)
        return torch.matmul(x * self.r.unsqueeze(1), self.weight.t()) * self.s.unsqueeze(1) + self.bias


class BroadcastBatchEnsemble(nn.Sequential):
    def __init__(self, inputs: int, hidden: int, classes: int, members: int, std: float) -> None:
        super().__init__(
            BroadcastLinear(inputs, hidden, members, std),
            nn.ReLU(),
            BroadcastLinear(hidden, hidden, members, std),
            nn.ReLU(),
            BroadcastLinear(hidden, classes, members, std),
        )


class StackedEnsemble(ek.nn.EnsembleMLP):
    """Members of their own, all layers of all members in one call."""

    def __init__(self, inputs: int, hidden: int, classes: int, members: int) -> None:
        super().__init__(inputs, [hidden, hidden], classes, num_members=members, activation="relu")


class BatchEnsemble(ek.nn.BatchEnsembleMLP):
    """One set of weights, scaled for each member as they are used; all layers in one call."""

    def __init__(self, inputs: int, hidden: int, classes: int, members: int, std: float) -> None:
        super().__init__(inputs, [hidden, hidden], classes, num_members=members, std=std, shared_bias=True)
