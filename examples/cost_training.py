"""The training loop of all rows of the cost table, with what is measured of it: time, and memory at its peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
from activation_memory import ActivationMemory
from image_data import Images
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

COUNTED = 1  # steps whose memory is counted


@dataclass
class Settings:
    members: int = 5
    hidden: int = 512
    epochs: int = 30
    batch: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0
    tick: Callable[[], None] = field(default=lambda: None, repr=False)  # called after each epoch

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stream)


@dataclass
class Trained:
    """What a method made, and what that took."""

    predict: Callable[[Tensor], Tensor]  # [B, features] to logits [E, B, C]
    kept: int  # bytes that have to be kept for predictions
    seconds: float  # of training
    peak: int  # bytes that were alive at once in a step of training


@dataclass
class Loop:
    """Epochs of steps.  Those whose memory is counted are slow, and not timed."""

    data: Images
    settings: Settings
    seconds: float = 0.0
    peak: int = 0
    steps: int = 0

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor],  # of a batch and its labels
        *,
        epochs: int | None = None,
        after_step: Callable[[], None] | None = None,
        after_epoch: Callable[[], None] | None = None,
    ) -> None:
        generator = self.settings.generator(1)
        model.train()
        for _ in range(self.settings.epochs if epochs is None else epochs):
            begin, steps, untimed = perf_counter(), 0, 0.0
            for x, y in self.data.batches(self.settings.batch, generator):
                if self.steps < COUNTED:
                    untimed += self._counted_step(model, optimizer, loss, x, y)
                else:
                    _step(optimizer, loss, x, y)
                    steps += 1
                self.steps += 1
                if after_step is not None:
                    after_step()
            if after_epoch is not None:
                after_epoch()
            seconds = perf_counter() - begin - untimed
            self.seconds += seconds * len(range(0, len(self.data.y_train), self.settings.batch)) / max(1, steps)
            self.settings.tick()
        model.eval()

    def _counted_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable, x: Tensor, y: Tensor
    ) -> float:
        begin = perf_counter()
        optimizer.zero_grad()
        with ActivationMemory() as memory:  # of activations and gradients
            loss(x, y).backward()
        optimizer.step()
        self.peak = max(self.peak, memory.peak + size_of(model.state_dict()) + size_of(optimizer.state_dict()))
        return perf_counter() - begin

    def trained(self, predict: Callable[[Tensor], Tensor], kept: object) -> Trained:
        return Trained(predict, size_of(kept), self.seconds, self.peak)


def size_of(tree: object) -> int:
    """Bytes of all tensors in nested lists and dicts."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def _step(optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss(x, y).backward()
    optimizer.step()
