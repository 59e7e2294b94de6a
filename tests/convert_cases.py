"""Plain models for the tests of ek.convert, of which forward code does more than call modules in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B = 4


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.layer1, self.layer2 = Block(6, 6), nn.Sequential(Block(6, 8, 2), Block(8, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.norm(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(self.layer2(x), 1).flatten(1))


class Skips(nn.Module):
    """What comes before `up` is used again behind it; a buffer is assigned, and a part called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 6, 2, stride=2)
        self.register_buffer("average", torch.zeros(6))
        self.scale = nn.Parameter(torch.ones(6, 1))
        self.up = nn.ConvTranspose1d(6, 6, 2, stride=2)
        self.mix = nn.Conv1d(12, 6, 1)
        self.again = nn.Linear(6, 6)
        self.out = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = torch.tanh(self.down1(x)) * self.scale
        if self.training:
            self.average = 0.9 * self.average + 0.1 * high.detach().mean((0, 2))
        low = torch.tanh(self.down2(high - self.average[:, None]))
        x = self.mix(torch.cat([high, self.up(low)], 1)) + high
        x = self.again(torch.tanh(self.again(x.mT))).mT
        return self.out(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.encoder(self.embed(x)))
        return {"tokens": self.head(x), "pooled": self.head(x.mean(1))}


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(8, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(7, 3),
    )


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a row
    axis: int  # of features, with one of rows in front
    splits: tuple[str, ...]  # where members may begin


CASES = {
    "mlp": Case(mlp, (6,), 1, ("3", "7")),
    "resnet": Case(ResNet, (3, 6, 5), 1, ("layer2", "layer2.1.norm1", "fc")),
    "skips": Case(Skips, (2, 8), 1, ("up",)),
    "tokens": Case(Tokens, (5, 6), -1, ("encoder.layers.1", "head")),
    "images to linear": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), (3, 2, 2), 1, ("3",)
    ),
}
