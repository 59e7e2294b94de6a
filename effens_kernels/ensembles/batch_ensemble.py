"""BatchEnsemble of whole models: members share the model's weights, and each scales them on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..nn import (
    BatchEnsembleConv1d,
    BatchEnsembleConv2d,
    BatchEnsembleConvTranspose2d,
    BatchEnsembleEmbedding,
    BatchEnsembleLinear,
    BatchEnsembleMultiheadAttention,
    EnsembleBatchNorm1d,
    EnsembleBatchNorm2d,
    EnsembleBatchNorm3d,
    EnsembleGroupNorm,
    EnsembleLayerNorm,
)
from ..nn.batchensemble import check_scales
from ..nn.norm import _EnsembleBatchNorm
from ..ops._checks import reject
from ._ensemble import Ensemble
from ._summary import Summary
from ._surgery import Sites, is_ours, replaced


class SequenceFirst:
    """Rows are the second axis, `[L, E*B, D]`, as inside of torch.nn's transformers without `batch_first`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(0, 1)).transpose(0, 1)


class SequenceFirstLinear(SequenceFirst, BatchEnsembleLinear):
    """:class:`BatchEnsembleLinear` there."""


class SequenceFirstLayerNorm(SequenceFirst, EnsembleLayerNorm):
    """:class:`EnsembleLayerNorm` there."""


LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: BatchEnsembleLinear.from_linear,
    nn.Conv1d: BatchEnsembleConv1d.from_conv,
    nn.Conv2d: BatchEnsembleConv2d.from_conv,
    nn.ConvTranspose2d: BatchEnsembleConvTranspose2d.from_conv,
    nn.Embedding: BatchEnsembleEmbedding.from_embedding,
    nn.MultiheadAttention: BatchEnsembleMultiheadAttention.from_attention,
}
NORMS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.BatchNorm1d: EnsembleBatchNorm1d.from_batchnorm,
    nn.BatchNorm2d: EnsembleBatchNorm2d.from_batchnorm,
    nn.BatchNorm3d: EnsembleBatchNorm3d.from_batchnorm,
    nn.LayerNorm: EnsembleLayerNorm.from_layernorm,
    nn.GroupNorm: EnsembleGroupNorm.from_groupnorm,
}
SEQUENCE_FIRST = {nn.Linear: SequenceFirstLinear.from_linear, nn.LayerNorm: SequenceFirstLayerNorm.from_layernorm}
OWN_NORMS = (_EnsembleBatchNorm, EnsembleLayerNorm, EnsembleGroupNorm)
ONE_WEIGHT = tuple(kind for kind in LAYERS if kind is not nn.MultiheadAttention)
ALWAYS_TILED = (nn.Embedding, nn.MultiheadAttention, nn.GroupNorm)
TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class Share(NamedTuple):
    """A row of the summary: the layers of one type, or what is shared as it is."""

    type: str
    layers: int
    shared: int  # parameters that members have together
    per_member: int  # parameters that each has


class BatchEnsemble(Ensemble):
    r"""A model whose layers have one weight for all members, and for each member scales of its inputs and outputs.

    .. math:: y_e = ((x_e \circ r_e) W^\top) \circ s_e + b_e

    BatchEnsemble (Wen et al. 2020, "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong
    Learning", equation 5), made by `effens_kernels.convert(model, "batch_ensemble", num_members, ...)`.  The weights
    are the model's, and members begin around it:

    - Linear, Conv1d, Conv2d, ConvTranspose2d: a shared weight, scales `r` and `s`, and a bias of each member's own;
    - MultiheadAttention: so are its projections; q, k and v of one packed weight have one `r`;
    - Embedding: a shared table, whose vectors members scale by `s`;
    - BatchNorm1d, 2d and 3d, LayerNorm, GroupNorm: each member's own, with the running statistics of the model.

    What `exclude` names or `include` does not is shared as it is; so are PReLU and RMSNorm.  A weight that such layers
    tie (an embedding and the last layer) stays one.  Inside of torch.nn's transformers without `batch_first`, rows are
    the second axis; in all other layers they have to be the first (of attention, the one that its `batch_first` says).

    Options of `convert`:
        scale_init: how `r` and `s` begin: "normal" of mean 1 and standard deviation `std`; "random_sign", 1 or -1, as
            the paper trains from scratch; "ones", with which all members are the model, and stay alike unless their
            rows or losses differ.  Signs make other functions of a trained model: each member is then as good as
            random.  "normal" keeps it, and is the default.
        std: 0.1 by default: members differ, and each is nearly as good as the model.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "batch_ensemble", num_members=4)
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([4, 32, 4])
        >>> ensemble.summary().rows
        (('Linear', 2, 768, 208), ('LayerNorm', 1, 0, 128))
        >>> optimizer = torch.optim.AdamW(ensemble.optimizer_groups(weight_decay=1e-2), lr=1e-3)
    """

    def __init__(self, model: nn.Module, num_members: int, shares: list[Share], plain: int) -> None:
        super().__init__(model, num_members)
        self.shares, self.plain = shares, plain

    def optimizer_groups(self, weight_decay: float, *, decay_norms: bool = True) -> list[dict[str, object]]:
        """Parameters for an optimizer, scales without weight decay, which would pull members towards 0.

        Args:
            weight_decay: of all other parameters.
            decay_norms: also of the norms that members have of their own.
        """
        free: list[nn.Parameter] = []
        for module in self.modules():
            if isinstance(module, OWN_NORMS):
                free += [] if decay_norms else module.parameters()
            elif is_ours(module):
                free += [p for name, p in module._parameters.items() if name[-2:] in ("r", "s", "_r", "_s")]
        return self._optimizer_groups(free, weight_decay)

    def summary(self) -> Summary:
        """A row for each type of layer: how many there are, and the parameters that members share and have each."""
        layers, shared, own = (sum(share[column] for share in self.shares) for column in (1, 2, 3))
        total = shared + self.num_members * own
        return Summary(
            f"BatchEnsemble of {self.num_members} members",
            ("type", "layers", "shared", "per member"),
            tuple(map(tuple, self.shares)),
            ("all", layers, shared, own),
            (
                f"{total:,} parameters in all, {total / self.plain:.2f} times the plain model",
                f"{self.num_members * self.plain:,} in {self.num_members} plain models",
            ),
        )


def convert(sites: Sites, num_members: int, scale_init: str = "normal", std: float = 0.1) -> BatchEnsemble:
    """The method "batch_ensemble"; its options are those of :class:`BatchEnsemble`."""
    check_scales("convert", scale_init, std, "scale_init")
    chosen = [site.module for site in sites.of((*LAYERS, *NORMS), ONE_WEIGHT)]
    if not any(type(module) in LAYERS for module in chosen):
        reject("convert", "model", f"with {', '.join(k.__name__ for k in LAYERS)} to convert", "one without")
    sequence_first = _sequence_first(sites.model)
    new: dict[nn.Module | Tensor, nn.Module | Tensor] = {}
    for plain in chosen:
        kind = type(plain)
        make = SEQUENCE_FIRST[kind] if id(plain) in sequence_first else (LAYERS | NORMS)[kind]
        options: dict[str, object] = {} if kind in ALWAYS_TILED else {"tiled": True}
        if kind in LAYERS:
            options |= {"init": scale_init, "std": std}
        new[plain] = layer = make(plain, num_members, **options)
        if kind in ONE_WEIGHT:  # which it may share
            layer.weight = new.setdefault(plain.weight, layer.weight)
    model = replaced(sites.model, new)
    shares = _shares([(plain, new[plain]) for plain in chosen], model, num_members)
    return BatchEnsemble(model, num_members, shares, sum(p.numel() for p in sites.model.parameters()))


def _sequence_first(model: nn.Module) -> set[int]:
    """The layers inside of torch.nn's transformers that get `[L, E*B, D]`, by id."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, TRANSFORMERS) or (module is model and isinstance(module, nn.MultiheadAttention)):
            parts = list(module.modules())
            if any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in parts):
                if module is model:
                    expected = "of rows in the first axis (batch_first=True, or inside of a module that transposes)"
                    reject("convert", "model", expected, f"{type(module).__name__} without batch_first")
                found |= {id(part) for part in parts if type(part) in SEQUENCE_FIRST}
    return found


def _shares(layers: list[tuple[nn.Module, nn.Module]], model: nn.Module, num_members: int) -> list[Share]:
    """Parameters are those of the first layer that has them."""
    counted: set[int] = set()
    rows: dict[str, list[int]] = {}
    for plain, layer in layers:
        row = rows.setdefault(type(plain).__name__, [0, 0, 0])
        row[0] += 1
        for name, p in layer.named_parameters():
            if id(p) not in counted:
                counted.add(id(p))
                shared = type(plain) in LAYERS and name.endswith("weight")
                row[1 if shared else 2] += p.numel() if shared else p.numel() // num_members
    others = [p.numel() for p in model.parameters() if id(p) not in counted]
    if others:
        holders = [m for m in model.modules() if any(id(p) not in counted for p in m.parameters(recurse=False))]
        rows["shared as they are"] = [len(holders), sum(others), 0]
    return [Share(name, *row) for name, row in rows.items()]
