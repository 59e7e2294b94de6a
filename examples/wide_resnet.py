"""Wide residual networks for images of 32 x 32, as in Zagoruyko & Komodakis 2016: WRN-28-10 is `WideResNet(28, 10)`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions, each after its normalization and activation, and a shortcut past them.

    Where the shape changes, the shortcut is a 1 x 1 convolution of what the first convolution sees.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(z)
        z = self.conv1(z)
        return self.conv2(F.relu(self.bn2(z))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks, of 16, 32 and 64 times `width` channels.

    Args:
        depth: 6 n + 4.
        width: k.
        classes: logits per image.
        channels: of the images.
        base: channels of the first convolution; smaller ones make networks for quick trials.
    """

    def __init__(self, depth: int, width: int, classes: int = 10, channels: int = 3, base: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet: depth should be 6 n + 4, got {depth}")
        self.conv = conv3x3(channels, base)
        stages, inputs = [], base
        for stage in range(3):
            outputs = base * width * 2**stage
            for block in range(blocks):
                stages.append(Block(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.bn, self.linear = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        return self.linear(x.mean((2, 3)))
