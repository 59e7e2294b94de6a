"""Images as rows of features: scikit-learn's handwritten digits, or CIFAR-10 where its files are at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Every row is an image."""

    name: str
    x_train: Tensor  # [N, features]
    y_train: Tensor  # [N]
    x_test: Tensor
    y_test: Tensor

    num_classes = 10

    @property
    def num_features(self) -> int:
        return self.x_train.shape[1]

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in a new order, the last batch being what is left."""
        for rows in torch.randperm(len(self.y_train), generator=generator).split(size):
            yield self.x_train[rows], self.y_train[rows]


def digits(seed: int) -> Images:
    """8 x 8 pixels of 1,797 digits, a quarter held out."""
    pixels, classes = load_digits(return_X_y=True)
    split = train_test_split(pixels / 8.0 - 1.0, classes, test_size=0.25, stratify=classes, random_state=seed)
    x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    y_train, y_test = (torch.tensor(part) for part in split[2:])
    return Images("digits", x_train, y_train, x_test, y_test)


def cifar10(root: Path) -> Images:
    """32 x 32 x 3 pixels from -1 to 1; raises RuntimeError, with what to do, where the files are not there."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise RuntimeError("--data cifar10 needs the package torchvision: pip install torchvision") from error
    try:
        parts = [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise RuntimeError(
            f"no CIFAR-10 in {root}: --root should be the folder that has cifar-10-batches-py in it "
            f"(torchvision.datasets.CIFAR10('{root}', download=True) fetches it)"
        ) from error
    tensors = []
    for part in parts:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).flatten(1).float()
        tensors += [pixels / 127.5 - 1.0, torch.tensor(part.targets)]
    return Images("CIFAR-10", *tensors)
