"""Models whose forward code does what forward code does, for the tests of ek.stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, B = 3, 4


class Residual(nn.Module):
    """Views, slices, functional calls with parameters of its own, a matrix product, in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3) / 3)
        self.bias = nn.Parameter(torch.randn(4))
        self.mix = nn.Parameter(torch.randn(6, 8))
        self.norm = nn.LayerNorm(6)
        self.scale = 0.5

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = x + scale * torch.tanh(F.linear(F.linear(self.norm(x), self.weight), self.mix))
        image = h.reshape(-1, 2, 3, 1).expand(-1, -1, -1, 3)
        image = F.conv2d(image, self.kernel, self.bias, padding=1)
        image = F.relu(image, inplace=True)
        h = h.clone()
        h[:, :4] += self.scale * image.mean((-1, -2))
        q, k = (h @ self.mix).unflatten(-1, (2, 4)).unbind(1)
        return torch.cat([q * k.sigmoid(), h.view(len(x), -1)], dim=-1).flatten(1)


class Tied(nn.Module):
    """A parameter under two names, a module under two, one that is None, a part that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = self.second
        self.nothing = None
        self.layers = [self.first, self.again]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.linear(self.again(x), self.second.weight.t())


class Rows(nn.Module):
    """Linear layers on tensors of one, two and four axes; there and in convolutions, weights that members share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.bias = nn.Parameter(torch.randn(2))
        self.register_buffer("constant", torch.ones(2, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([self.linear(row) for row in x])
        four = self.linear(x[:, None, None].expand(-1, 2, 1, -1)).sum((1, 2))
        shared = F.linear(rows + four, torch.ones(2, 5, dtype=x.dtype), self.bias)
        images = F.conv1d(x[:, None], torch.ones(2, 1, 6, dtype=x.dtype), self.bias)
        shared = shared + images.squeeze(-1) + F.conv1d(rows[:, None], torch.ones(2, 1, 5, dtype=x.dtype)).squeeze(-1)
        return shared + F.linear(rows, self.constant) + F.linear(x, self.linear.weight)[:, :2]


class Statistics(nn.Module):
    """Running statistics of torch.nn, and one that is assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.plain = nn.BatchNorm1d(6, affine=False, momentum=0.3)
        self.images = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("unused", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.norm(x)).square()
        x = self.images(x.view(-1, 3, 2)).flatten(1)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x - self.average


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, add_bias_kv=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        y, _ = self.attention(x, x, x, need_weights=False, is_causal=True, attn_mask=self.mask(tokens.shape[-1], x))
        x = self.norm(x + y)
        y, weights = self.cross(x.transpose(0, 1), memory, memory)
        return x + y.transpose(0, 1), weights

    def mask(self, length: int, like: Tensor) -> Tensor:
        return nn.Transformer.generate_square_subsequent_mask(length, dtype=like.dtype)


class Attention(nn.Module):
    """Attention of ranks 2 to 4, with masks, and with keys that all members share."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 8)
        self.bias = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 3, 2).repeat(1, 1, 3)
        q = self.query(tokens)
        heads = q.unflatten(-1, (2, 4)).transpose(1, 2)
        keys = tokens[..., :4].unsqueeze(1).expand(-1, 2, -1, -1)
        attend = F.scaled_dot_product_attention
        y = attend(heads, keys, heads) + attend(heads, heads, heads, attn_mask=self.bias)
        y = y + attend(heads, heads, keys, is_causal=True, scale=0.3)
        mask = torch.ones(len(x), 1, 3, 3, dtype=torch.bool).tril()
        y = y + attend(heads, keys, heads, attn_mask=mask)
        return y.transpose(1, 2).flatten(2) + attend(q, q, q) + attend(q[0], q[0], q[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 3)
        self.rnn = nn.RNN(3, 4, bias=False, nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, object]:
        y, (h, c) = self.lstm(x.view(-1, 3, 2))
        y, state = self.gru(y)
        return {"y": self.rnn(y, None)[0], "states": [h, c, state], "nothing": (None, 3)}


class Images(nn.Module):
    """Convolutions of every kind, and norms."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{axes}d"), getattr(nn, f"ConvTranspose{axes}d")
        self.axes = axes
        self.same = conv(2, 4, 2, padding="same", padding_mode="zeros")
        self.around = conv(4, 4, 3, padding=1, padding_mode="circular", groups=2, bias=False)
        self.norm = getattr(nn, f"BatchNorm{axes}d")(4)
        self.strided = conv(4, 6, 3, stride=2, padding=1, dilation=1)
        self.group = nn.GroupNorm(2, 6)
        self.up = up(6, 4, 3, stride=2, output_padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = x.view(-1, 2, 3, *(1,) * (self.axes - 1)).expand(-1, -1, 3, *(3,) * (self.axes - 1))
        image = self.norm(self.around(self.same(image))).relu_()
        image = self.group(self.strided(image))
        image = (
            image + torch.stack([self.strided(self.same(one)) for one in x.view(-1, 2, 3)]) if self.axes == 1 else image
        )
        return self.head(self.up(image).flatten(2).mean(-1))


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[tuple[int, ...]], tuple[Tensor, ...]] = lambda lead: (torch.randn(*lead, B, 6),)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


CASES = {
    "mlp": Case(lambda: sequence(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5, bias=False), nn.PReLU(5))),
    "residual": Case(Residual),
    "tied": Case(Tied),
    "rows": Case(Rows),
    "statistics": Case(Statistics),
    "tokens": Case(Tokens, lambda lead: (torch.randint(7, (*lead, B, 5)), torch.randn(*lead, 2, B, 6))),
    "attention": Case(Attention),
    "encoder": Case(
        lambda: sequence(
            nn.Unflatten(1, (3, 2)),
            nn.Linear(2, 8),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2),
        )
    ),
    "recurrent": Case(Recurrent),
    "conv1d": Case(lambda: Images(1)),
    "conv2d": Case(lambda: Images(2)),
    "conv3d": Case(lambda: Images(3)),
    "weight_norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
}
