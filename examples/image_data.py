"""Images as rows of features: scikit-learn's handwritten digits, or CIFAR-10 and -100 where their files are at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
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
    shape: tuple[int, int, int]  # channels, height, width of an image
    num_classes: int = 10

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
    return Images("digits", x_train, y_train, x_test, y_test, (1, 8, 8))


def cifar(classes: int, root: Path) -> Images:
    """32 x 32 x 3 pixels from -1 to 1; raises RuntimeError, with what to do, where the files are not there."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError(f"--data cifar{classes} needs the package torchvision: pip install torchvision") from error
    kind, folder = getattr(datasets, f"CIFAR{classes}"), {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise RuntimeError(
            f"no CIFAR-{classes} in {root}: --root should be the folder that has {folder} in it "
            f"(torchvision.datasets.CIFAR{classes}('{root}', download=True) fetches it)"
        ) from error
    tensors = []
    for part in parts:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).flatten(1).float()
        tensors += [pixels / 127.5 - 1.0, torch.tensor(part.targets)]
    return Images(f"CIFAR-{classes}", *tensors, (3, 32, 32), classes)


def load(name: str, root: Path, seed: int) -> Images:
    """By the name of the option --data: "digits", "cifar10" or "cifar100"."""
    return digits(seed) if name == "digits" else cifar(int(name.removeprefix("cifar")), root)


def shifted(data: Images, strength: float, seed: int) -> Tensor:
    """The test images as another scanner might have them: turned, moved and noisy, each in its own way.

    `strength` 1 turns by up to 20 degrees, moves by up to an eighth, and adds noise of a tenth of the range of pixels.
    """
    random = np.random.default_rng(seed)
    images = data.x_test.reshape(-1, *data.shape).numpy()
    size = data.shape[-1]
    turned = []
    for image in images:
        angle, move = random.uniform(-20, 20) * strength, random.uniform(-size / 8, size / 8, 2) * strength
        image = ndimage.rotate(image, angle, axes=(1, 2), reshape=False, order=1, mode="constant", cval=-1.0)
        turned.append(ndimage.shift(image, (0, *move), order=1, mode="constant", cval=-1.0))
    noisy = np.stack(turned) + random.normal(0.0, 0.2 * strength, images.shape)
    return torch.from_numpy(noisy.clip(-1.0, 1.0)).float().flatten(1)
