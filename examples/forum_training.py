"""Training two models in step with each other, and what an ensemble is for: accuracy and disagreement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from forum_data import Batch, Bootstrap, Digits
from torch import Tensor, nn


def head_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the heads, each over the rows of its own mask."""
    members_heads = logits.shape[1:3]
    targets = batch.y.unsqueeze(-1).expand(-1, *members_heads)
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(batch.mask)
    return ((losses * batch.mask).sum(0) / batch.mask.sum(0).clamp(min=1)).mean()


@dataclass
class Trainee:
    """A model, its optimizer, and the seconds that every step took."""

    name: str
    model: nn.Module
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    loss: float = float("nan")

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        begin = perf_counter()
        loss = head_losses(self.model(batch.x), batch)
        forward = perf_counter()
        loss.backward()
        backward = perf_counter()
        self.optimizer.step()
        self.update.append(perf_counter() - backward)
        self.backward.append(backward - forward)
        self.forward.append(forward - begin)
        self.loss = loss.item()

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Median forward (with the loss), backward, and optimizer update."""
        return median(self.forward) * 1e3, median(self.backward) * 1e3, median(self.update) * 1e3

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def train_in_step(trainees: list[Trainee], data: Bootstrap, epochs: int, progress: Callable[[], None]) -> None:
    """Every batch goes to each model in turn: the same data, and the same disturbances of the clock.

    The first round is warm-up: it is trained on but not in the times.
    """
    for _ in range(epochs):
        for batch in data.epoch():
            for trainee in trainees:
                trainee.step(batch)
            progress()
    for trainee in trainees:
        for times in (trainee.forward, trainee.backward, trainee.update):
            del times[: min(len(data), len(times) - 1)]


@dataclass(frozen=True)
class Quality:
    """On held-out data.  Disagreement is the mutual information of prediction and ensemble member, in nats."""

    member_accuracy: float
    ensemble_accuracy: float
    disagreement_when_right: float
    disagreement_when_wrong: float


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits, members: int) -> Quality:
    rows = digits.x_test.unsqueeze(1).expand(-1, members, -1)
    probabilities = model(rows).softmax(-1)  # [N, E, heads, classes]
    by_member, by_all = probabilities.mean(2), probabilities.mean((1, 2))
    right = by_all.argmax(-1) == digits.y_test
    disagreement = _entropy(by_all) - _entropy(probabilities).mean((1, 2))
    return Quality(
        member_accuracy=(by_member.argmax(-1) == digits.y_test.unsqueeze(-1)).float().mean().item(),
        ensemble_accuracy=right.float().mean().item(),
        disagreement_when_right=disagreement[right].mean().item(),
        disagreement_when_wrong=disagreement[~right].mean().item(),
    )


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)
