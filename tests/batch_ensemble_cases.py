"""Models of every kind of layer, for the tests of ek.convert to a BatchEnsemble."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOUBLE = {"dtype": torch.float64}


class Residual(nn.Module):
    """Images: BatchNorm, GroupNorm, residuals, groups, a part that is used twice, one that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.GroupNorm(2, 8), nn.PReLU())
        self.again = self.block
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = x + self.block(x)
        x = x + self.again(x)
        return self.head(x.mean((2, 3)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1)
        self.norm, self.out = nn.BatchNorm2d(6, affine=False), nn.ConvTranspose2d(6, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.up(x)))
        return self.out(x, output_size=[2 * n + 1 for n in x.shape[2:]])


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm3d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).flatten(1))


class SequenceFirst(nn.Module):
    """Torch's transformers with `[L, B, D]`, cross attention of another width, masks that the model makes."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, activation="gelu")
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        read = self.read(x).transpose(0, 1)
        memory = self.encoder(read, mask=causal, is_causal=True)
        y = self.decoder(read, memory, tgt_mask=causal)
        y, weights = self.cross(y, x.transpose(0, 1), x.transpose(0, 1))
        return y.transpose(0, 1), weights


class Encoder(nn.Module):
    """`batch_first`, with a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=padding)
        keep = torch.ones_like(y[..., :1]) if padding is None else (~padding).unsqueeze(-1).to(y.dtype)
        return self.head((y * keep).sum(1))


class Words(nn.Module):
    """An embedding whose table is the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def images(*sizes: int) -> Callable[..., Tensor]:
    return lambda *lead: torch.randn(*lead, *sizes, **DOUBLE)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5, bias=False)),
        images(4, 6),
    ),
    "residual": (Residual, images(3, 6, 5)),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm1d(6, momentum=None),
            nn.ReLU(),
            nn.Conv1d(6, 4, 3, stride=2, groups=2),
            nn.LayerNorm([4, 3], bias=False),
        ),
        images(4, 7),
    ),
    "decoder": (Decoder, images(4, 3, 4)),
    "volumes": (Volumes, images(2, 2, 2, 2)),
    "encoder": (Encoder, images(5, 8)),
    "sequence first": (SequenceFirst, images(6, 6)),
    "words": (Words, lambda *lead: torch.randint(11, (*lead, 7))),
}


def made(name: str) -> nn.Module:
    """A model whose biases, norms and statistics are no zeros and ones."""
    model = MODELS[name][0]().double()
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.add_(0.3 * torch.rand_like(t))
    return model


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
