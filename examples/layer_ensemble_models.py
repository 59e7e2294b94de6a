"""The networks of examples/layer_ensembles.py, which the benchmarks share."""

from __future__ import annotations

from torch import nn


def mlp(inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Two hidden layers."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        *drop,
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        *drop,
        nn.Linear(hidden, outputs),
    )


def cnn() -> nn.Sequential:
    """Four layers for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
