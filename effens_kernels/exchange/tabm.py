"""Exchange with tabm (Gorishniy et al. 2025, "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
Ensembling"): its layers and models, and their states.

tabm is neither needed nor imported: its layers are known by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn import BatchEnsembleLinear, EnsembleBatchNorm1d, EnsembleLayerNorm, EnsembleLinear
from ..nn._layout import as_given, members_first
from ..ops import grouped_linear, rank1_linear
from ..ops._checks import reject
from . import _states
from ._accelerate import Fusing, is_of
from ._accelerate import accelerate as _accelerate
from ._states import Entry
from ._tabm_model import TabM

__all__ = ["accelerate", "from_layer", "from_state", "load_state_dict", "state_dict"]


def _transposed(value: Tensor, layer: nn.Module) -> Tensor:
    return value.transpose(-2, -1)


def _flat(value: Tensor, layer: nn.Module) -> Tensor:
    return value.flatten()


def _per_member(value: Tensor, layer: nn.Module) -> Tensor:
    return value.unflatten(0, (layer.num_members, -1))


def _one_count(value: Tensor, layer: nn.Module) -> Tensor:
    if not value.is_meta and (value != value[0]).any():
        expected = "of members that have seen as many batches as each other, which tabm counts once"
        reject("state_dict", "model", expected, f"num_batches_tracked {value.tolist()}")
    return value[0]


def _same_count(value: Tensor, layer: nn.Module) -> Tensor:
    return value.repeat(layer.num_members)


_AFFINE = Entry("weight", "affine.weight"), Entry("bias", "affine.bias")
_ENTRIES: dict[type[nn.Module], tuple[Entry, ...]] = {
    BatchEnsembleLinear: (),  # the same names and axes
    EnsembleLinear: (Entry("weight", "weight", _transposed, _transposed),),
    EnsembleBatchNorm1d: (
        *_AFFINE,
        Entry("running_mean", "impl.running_mean", _flat, _per_member),
        Entry("running_var", "impl.running_var", _flat, _per_member),
        Entry("num_batches_tracked", "impl.num_batches_tracked", _one_count, _same_count),
    ),
    EnsembleLayerNorm: _AFFINE,
}


def _entries(layer: nn.Module, path: str) -> tuple[Entry, ...] | None:
    if isinstance(layer, BatchEnsembleLinear) and layer.bias is not None and layer.shared_bias:
        reject("exchange.tabm", "model", "of layers with a bias per member", f"shared_bias=True at {path!r}")
    return _ENTRIES.get(type(layer))


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a layer or a model of this package's layers under tabm's names and axis orders.

    =========================  =======================  =============================================================
    layer of :mod:`.nn`        of tabm                  what differs
    =========================  =======================  =============================================================
    `BatchEnsembleLinear`      `LinearBatchEnsemble`    nothing: `weight` `[O, I]`, `r` `[E, I]` scales inputs, `s`
                                                        `[E, O]` outputs, `bias` `[E, O]`
    `EnsembleLinear`           `LinearEnsemble`         `weight` is `[E, I, O]` there, `[E, O, I]` here
    `EnsembleBatchNorm1d`      `BatchNorm1dEnsemble`    `affine.weight`, `affine.bias` `[E, C]`; running statistics are
                                                        `[E*C]`, in `impl`, and batches are counted once for all members
    `EnsembleLayerNorm`        `LayerNormEnsemble`      `affine.weight`, `affine.bias`
    :class:`TabM`              `TabM`, `make_tabm_...`  as its layers
    =========================  =======================  =============================================================

    Other modules keep their names.  The paths of modules are those of the model: it has to be built like the one of
    tabm that is to load this.

    Args:
        model: as above; values are shared with it where no axis differs, as those of torch's `state_dict` are.

    Returns:
        What `load_state_dict` of the model of tabm takes; :func:`load_state_dict` is the inverse, with the same bits.

    Raises:
        TypeError: `model` is no module.
        ValueError: a layer of this package that tabm has not (named, with its path), or a bias that members share.

    Example:
        >>> import torch, effens_kernels as ek
        >>> layer = ek.nn.EnsembleLinear(8, 2, num_members=32, batch_first=True)
        >>> {name: list(value.shape) for name, value in ek.exchange.tabm.state_dict(layer).items()}
        {'weight': [32, 8, 2], 'bias': [32, 2]}
    """
    return _states.outward("exchange.tabm.state_dict", model, _entries)


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the state of a layer or a model of tabm into one of this package's layers, built alike.

    Args:
        model: see :func:`state_dict`; it is returned.
        state: all of the other model's, as read from a file; values go to the model's dtypes and devices.

    Raises:
        TypeError: `model` is no module, or `state` no mapping.
        ValueError: a name is missing or left over, or a shape differs; named, and before anything is loaded.

    Example:
        >>> import torch, effens_kernels as ek
        >>> state = {"weight": torch.randn(32, 8, 2), "bias": torch.randn(32, 2)}  # LinearEnsemble(8, 2, k=32)
        >>> layer = ek.nn.EnsembleLinear(8, 2, num_members=32, batch_first=True)
        >>> layer = ek.exchange.tabm.load_state_dict(layer, state)
        >>> x = torch.randn(256, 32, 8)
        >>> torch.allclose(layer(x), torch.einsum("bki,kio->bko", x, state["weight"]) + state["bias"], atol=1e-5)
        True
    """
    model.load_state_dict(_states.inward("exchange.tabm.load_state_dict", model, state, _entries))
    return model


def from_layer(layer: nn.Module) -> nn.Module:
    """The layer of :mod:`effens_kernels.nn` with the values of a layer of tabm: `[B, E, ...]` to `[B, E, ...]`.

    Args:
        layer: a `LinearBatchEnsemble`, `LinearEnsemble`, `BatchNorm1dEnsemble` or `LayerNormEnsemble`.  Its dtype,
            device, `requires_grad` and mode are kept; parameters are copies.

    Returns:
        A layer with `batch_first=True`, whose state :func:`state_dict` gives back.  Layer norms take one axis of rows.

    Raises:
        TypeError: `layer` is no module.
        ValueError: a layer without a counterpart, as `ElementwiseAffine`, or not of tabm.

    Example:
        >>> class LinearEnsemble(torch.nn.Module):  # tabm.LinearEnsemble, in short
        ...     __module__ = "tabm"
        ...     def __init__(self, in_features, out_features, k):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(k, in_features, out_features))
        ...         self.bias = torch.nn.Parameter(torch.randn(k, out_features))
        >>> from_layer(LinearEnsemble(8, 2, k=32))
        EnsembleLinear(in_features=8, out_features=2, num_members=32, bias=True, batch_first=True)
    """
    op = "exchange.tabm.from_layer"
    if not isinstance(layer, nn.Module):
        reject(op, "layer", "a torch.nn.Module", type(layer).__name__, TypeError)
    kind = type(layer).__name__
    if not is_of(layer, "tabm") or kind not in _BUILD:
        reject(op, "layer", f"a layer of tabm that has a counterpart ({', '.join(_BUILD)})", kind)
    with torch.device("meta"):
        ours = _BUILD[kind](layer)
    return _states.fill(op, ours, layer, _entries)


def _options(theirs: nn.Module) -> dict[str, object]:
    """An activation is that of a layer that :func:`accelerate` had."""
    return {"batch_first": True, "dtype": theirs.weight.dtype, "activation": getattr(theirs, "activation", None)}


def _linear_ensemble(theirs: nn.Module) -> nn.Module:
    members, inputs, outputs = theirs.weight.shape
    return EnsembleLinear(inputs, outputs, members, theirs.bias is not None, **_options(theirs))


def _linear_batch_ensemble(theirs: nn.Module) -> nn.Module:
    outputs, inputs = theirs.weight.shape
    return BatchEnsembleLinear(inputs, outputs, len(theirs.r), theirs.bias is not None, **_options(theirs))


def _batch_norm(theirs: nn.Module) -> nn.Module:
    norm, affine = theirs.impl, theirs.affine is not None
    sizes = norm.num_features // theirs.k, theirs.k, norm.eps, norm.momentum, affine, norm.running_mean is not None
    dtype = next((t.dtype for t in theirs.state_dict().values() if t.is_floating_point()), None)
    return EnsembleBatchNorm1d(*sizes, batch_first=True, dtype=dtype)


def _layer_norm(theirs: nn.Module) -> nn.Module:
    norm, affine = theirs.impl, theirs.affine is not None
    dtype = theirs.affine.weight.dtype if affine else None
    return EnsembleLayerNorm(norm.normalized_shape, theirs.k, norm.eps, affine, batch_first=True, dtype=dtype)


_BUILD = {
    "LinearBatchEnsemble": _linear_batch_ensemble,
    "LinearEnsemble": _linear_ensemble,
    "BatchNorm1dEnsemble": _batch_norm,
    "LayerNormEnsemble": _layer_norm,
}


class LinearBatchEnsemble(Fusing):
    def forward(self, x: Tensor) -> Tensor:
        x = members_first("LinearBatchEnsemble", x, len(self.r), batch_first=True)
        y = rank1_linear(x, self.weight, self.r, self.s, self.bias, activation=self.activation)
        return as_given(y, batch_first=True, tiled=False)


class LinearEnsemble(Fusing):
    """Also the `_NLinear` of rtdl_num_embeddings, whose members are features."""

    @property
    def k(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        x = members_first("LinearEnsemble", x, self.k, batch_first=True)
        y = grouped_linear(x, self.weight.mT, self.bias, activation=self.activation)
        return as_given(y, batch_first=True, tiled=False)


_ACCELERATED = {
    "LinearBatchEnsemble": LinearBatchEnsemble,
    "LinearEnsemble": LinearEnsemble,
    "_NLinear": LinearEnsemble,
}


def accelerate(model: nn.Module) -> nn.Module:
    """Let a model of tabm compute with this package's kernels: a `TabM`, or any module with layers of tabm in it.

    Its `LinearBatchEnsemble` and `LinearEnsemble`, and the `_NLinear` of its rtdl_num_embeddings, change their class.
    Their parameters are the same objects under the same names: optimizers, `state_dict` and hooks stay.  An activation
    (`ReLU`, exact `GELU`, `SiLU`, `Tanh`) right after such a layer in an `nn.Sequential`, where neither has hooks, is
    computed with it, and `nn.Identity` takes its place.  Everything else stays: norms, dropout, `ElementwiseAffine` and
    the linear layers that all members share are PyTorch's own operations on all members at once.  Under autocast,
    results are of its dtype, also where a bias of 32 bits is added.

    Args:
        model: changed in place, and returned.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no layer of tabm to accelerate in it.

    Example:
        >>> class LinearEnsemble(torch.nn.Module):  # tabm.LinearEnsemble, in short
        ...     __module__ = "tabm"
        ...     def __init__(self, in_features, out_features, k):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(k, in_features, out_features))
        ...         self.bias = torch.nn.Parameter(torch.randn(k, out_features))
        ...     def forward(self, x):
        ...         return (x.transpose(0, 1) @ self.weight).transpose(0, 1) + self.bias
        >>> model = torch.nn.Sequential(LinearEnsemble(8, 64, k=32), torch.nn.ReLU(), LinearEnsemble(64, 2, k=32))
        >>> x = torch.randn(256, 32, 8)
        >>> before = model(x)
        >>> torch.allclose(accelerate(model)(x), before, atol=1e-4)
        True
        >>> model
        Sequential(
          (0): LinearEnsemble(activation='relu')
          (1): Identity()
          (2): LinearEnsemble()
        )
    """
    return _accelerate("exchange.tabm.accelerate", model, _ACCELERATED, "tabm", "rtdl_num_embeddings")


def from_state(state: Mapping[str, Tensor], *, activation: str | None = "relu", dropout: float = 0.1) -> TabM:
    """The ensemble of a `tabm.TabM`, of any of its architectures, from its state alone.

    Args:
        state: its `state_dict`: names that begin with `backbone.` and `output.`.  Embeddings of numbers
            (`num_module.`) are modules of another package, rtdl_num_embeddings: leave their names out, and give the
            ensemble what they return, flattened, beside one-hot encoded categories.
        activation, dropout: those of the model, which are not in its state.

    Returns:
        A :class:`TabM` with copies of the values: `tabm.state_dict` gives the state back, with the same bits.

    Raises:
        TypeError: `state` is no mapping.
        ValueError: names that are of no architecture of TabM, or that are not of the ensemble; shapes that do not fit;
            an unknown activation.

    Example:
        >>> state = {
        ...     "backbone.blocks.0.0.weight": torch.randn(64, 8), "backbone.blocks.0.0.bias": torch.randn(32, 64),
        ...     "backbone.blocks.0.0.r": torch.randn(32, 8), "backbone.blocks.0.0.s": torch.randn(32, 64),
        ...     "output.weight": torch.randn(32, 64, 2), "output.bias": torch.randn(32, 2),
        ... }
        >>> model = from_state(state).eval()
        >>> model(torch.randn(256, 8)).shape
        torch.Size([256, 32, 2])
    """
    op = "exchange.tabm.from_state"
    if not isinstance(state, Mapping):
        reject(op, "state", "a state_dict", type(state).__name__, TypeError)
    model = TabM._like(op, state, activation, dropout)
    return load_state_dict(model, state)
