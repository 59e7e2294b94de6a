"""BatchEnsembleEmbedding: one table for all members, whose vectors each scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import reject
from ._layout import one_member, positive
from .batchensemble import check_scales, draw_scales, folded, scales_repr


class BatchEnsembleEmbedding(nn.Module):
    r"""An embedding per member, of one shared table: :math:`y_e = W_{x_e} \circ s_e`.

    The layer of BatchEnsemble (Wen et al. 2020, equation 5) for inputs that are one of many, of which `r` would be one
    number for each entry of the table and member; members have `s` alone.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as
            in `torch.nn.Embedding`.
        num_members: E.
        init, std: of `s`, as in :class:`BatchEnsembleLinear`.

    Parameters `weight` `[V, D]`, drawn as that of `torch.nn.Embedding`, and `s` `[E, D]`.

    `forward(input, member=None)`: integers `[E*B, ...]`, all rows of the first member first, to `[E*B, ..., D]`; with
    `member=e`, of any shape, of that member alone.

    Example:
        >>> layer = BatchEnsembleEmbedding(1000, 64, num_members=5)
        >>> layer(torch.randint(1000, (5 * 32, 10))).shape
        torch.Size([160, 10, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_members: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        init: str = "normal",
        std: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = "BatchEnsembleEmbedding"
        positive(layer, num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_members=num_members)
        check_scales(layer, init, std)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            reject(layer, "padding_idx", f"in [-{num_embeddings}, {num_embeddings})", repr(padding_idx))
        self.num_embeddings, self.embedding_dim, self.num_members = num_embeddings, embedding_dim, num_members
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.init, self.std = init, std
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.s = nn.Parameter(torch.empty(num_members, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            self.weight[self.padding_idx].zero_()
        draw_scales(self.init, self.std, self.s)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, num_members: int, **options: object) -> BatchEnsembleEmbedding:
        """Members of the given table (copied), with scales of their own.

        Args:
            embedding: its options, dtype, device, `requires_grad` and mode are kept.
            options: `init`, `std`.
        """
        if not isinstance(embedding, nn.Embedding):
            expected = "a torch.nn.Embedding"
            reject("BatchEnsembleEmbedding.from_embedding", "embedding", expected, type(embedding).__name__, TypeError)
        weight = embedding.weight
        sizes = embedding.num_embeddings, embedding.embedding_dim, num_members
        layer = cls(*sizes, *cls._options(embedding), **options, device=weight.device, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        return layer.train(embedding.training)

    @staticmethod
    def _options(layer: nn.Module) -> tuple[object, ...]:
        return layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse

    @torch.no_grad()
    def _plain(self, member: int) -> nn.Embedding:
        """torch.nn's layer of one member.

        A table whose rows are renormalized (`max_norm`) is so before it is scaled, and the member's is not again.
        """
        padding_idx, _, norm_type, *how = self._options(self)
        options = padding_idx, None, norm_type, *how
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, *options, device="meta")
        weight = self.weight
        if self.max_norm is not None:
            weight = weight.renorm(self.norm_type, 0, self.max_norm)
        ones = weight.new_ones(1, self.num_embeddings)
        plain.weight = nn.Parameter(folded(weight, ones, self.s[member : member + 1])[0], self.weight.requires_grad)
        return plain.train(self.training)

    def forward(self, input: Tensor, member: int | None = None) -> Tensor:
        layer = "BatchEnsembleEmbedding"
        if not isinstance(input, Tensor) or input.is_floating_point():
            reject(layer, "input", "a tensor of integers", input, TypeError)
        y = F.embedding(input, self.weight, *self._options(self))
        if member is not None:
            return y * self.s[one_member(layer, None, member, self.num_members)][0]
        if input.dim() == 0 or input.shape[0] % self.num_members:
            reject(layer, "input", f"[E*B, ...] with E={self.num_members}", input)
        rows = self.num_members, input.shape[0] // self.num_members
        s = self.s.view(self.num_members, *(1,) * input.dim(), self.embedding_dim)
        return (y.unflatten(0, rows) * s).flatten(0, 1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, num_members={self.num_members}"
            + (f", padding_idx={self.padding_idx}" if self.padding_idx is not None else "")
            + f", {scales_repr(self.init, self.std)}"
        )
