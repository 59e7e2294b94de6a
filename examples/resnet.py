"""ResNet-50 for images of 224 x 224, as in He et al. 2016, with the stride in the 3 x 3 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, to four times `channels`, and a shortcut past them."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.conv1, self.bn1 = conv(inputs, channels, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = conv(channels, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(x)))
        z = F.relu(self.bn2(self.conv2(z)))
        z = self.bn3(self.conv3(z))
        return F.relu(z + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Four stages of as many bottlenecks as `blocks` says; `ResNet()` is ResNet-50."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        stages, inputs = [], 64
        for stage, count in enumerate(blocks):
            channels = 64 * 2**stage
            for block in range(count):
                stages.append(Bottleneck(inputs, channels, 2 if stage and not block else 1))
                inputs = 4 * channels
        self.blocks, self.linear = nn.Sequential(*stages), nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, 2, 1)
        return self.linear(self.blocks(x).mean((2, 3)))
