"""scikit-learn's handwritten digits, bootstrapped: every member and every head learns from data of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """8 x 8 pixels in 10 classes, a quarter held out."""

    x_train: Tensor  # [N, 64]
    y_train: Tensor  # [N]
    x_test: Tensor
    y_test: Tensor

    num_features = 64
    num_classes = 10

    @classmethod
    def load(cls, seed: int) -> Digits:
        pixels, classes = load_digits(return_X_y=True)
        split = train_test_split(pixels / 16.0, classes, test_size=0.25, stratify=classes, random_state=seed)
        x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
        y_train, y_test = (torch.tensor(part) for part in split[2:])
        return cls(x_train, y_train, x_test, y_test)


@dataclass(frozen=True)
class Batch:
    x: Tensor  # [B, E, 64], rows of each member's own bootstrap sample
    y: Tensor  # [B, E]
    mask: Tensor  # [B, E, heads], 0 or 1: which heads learn from this row


class Bootstrap:
    """A sample with replacement per member, and a fixed half of it per head."""

    def __init__(self, digits: Digits, members: int, heads: int, batch: int, seed: int) -> None:
        self.digits, self.batch = digits, batch
        self.generator = torch.Generator().manual_seed(seed)
        size = len(digits.x_train)
        self.rows = torch.randint(size, (size, members), generator=self.generator)
        self.masks = torch.rand(size, members, heads, generator=self.generator) < 0.5

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.rows) // self.batch

    def epoch(self) -> Iterator[Batch]:
        """Every member's sample in a new order; rows left over after the last full batch wait for another epoch."""
        order = torch.rand(self.rows.shape, generator=self.generator).argsort(dim=0)
        for at in order[: len(self) * self.batch].split(self.batch):
            rows = self.rows.gather(0, at)
            mask = self.masks.gather(0, at.unsqueeze(-1).expand(-1, -1, self.masks.shape[-1]))
            yield Batch(self.digits.x_train[rows], self.digits.y_train[rows], mask.float())
