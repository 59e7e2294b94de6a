"""Exchange with torch-uncertainty (Lafage et al. 2025): its BatchEnsemble, Masksembles and Packed-Ensembles layers.

torch-uncertainty is neither needed nor imported: its layers are known by the names of their classes.  Rows of members
are tiled there: `[E*B, ...]`, all rows of the first member first, which is `tiled=True` here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import BatchEnsembleConv2d, BatchEnsembleLinear, EnsembleLinear
from ..nn._layout import members_first
from ..ops import grouped_linear, rank1_conv1d, rank1_conv2d, rank1_conv_transpose2d, rank1_linear
from ..ops._checks import reject
from . import _states
from ._accelerate import Accelerated, Fusing, is_of
from ._accelerate import accelerate as _accelerate
from ._states import Entries, Entry

__all__ = ["accelerate", "from_layer", "load_state_dict", "state_dict"]


def _scales(product: str) -> tuple[Entry, ...]:
    return Entry("weight", f"{product}.weight"), Entry("r", "r_group"), Entry("s", "s_group"), Entry("bias", "bias")


def _masks(value: Tensor, layer: nn.Module) -> Tensor:
    if not value.is_meta and ((value != 0) & (value != 1)).any():
        reject("exchange.torch_uncertainty", "model", "of an r of zeros and ones where it is not trained", value)
    return value.double()  # as torch-uncertainty has them


def _masked(product: str) -> tuple[Entry, ...]:
    masks = Entry("r", "mask.masks", _masks)
    return Entry("weight", f"{product}.weight"), masks, Entry("s", None), Entry("bias", f"{product}.bias")


_PACKED = (
    Entry("weight", "weight", inward=lambda value, layer: value.reshape(layer.weight.shape)),
    Entry("bias", "bias", lambda value, _: value.flatten(), lambda value, layer: value.reshape(layer.bias.shape)),
)
_PACKED_FIRST = (
    Entry("weight", "weight", lambda value, _: value.flatten(0, 1).unsqueeze(0), _PACKED[0].inward),
    _PACKED[1],
)


def _entries_of(op: str, model: object, first: Collection[str]) -> Entries:
    if isinstance(first, str) or not isinstance(first, Collection):
        reject(op, "first", "paths of layers", repr(first), TypeError)
    packed = [path for path, layer in getattr(model, "named_modules", list)() if type(layer) is EnsembleLinear]
    for path in first:
        if path not in packed:
            reject(op, "first", f"paths of an EnsembleLinear ({', '.join(map(repr, packed))})", repr(path))

    def entries(layer: nn.Module, path: str) -> tuple[Entry, ...] | None:
        if type(layer) is EnsembleLinear:
            return _PACKED_FIRST if path in first else _PACKED
        if type(layer) not in (BatchEnsembleLinear, BatchEnsembleConv2d):
            return None
        product = "linear" if type(layer) is BatchEnsembleLinear else "conv"
        if not layer.r.requires_grad and not layer.s.requires_grad and (layer.bias is None or layer.shared_bias):
            return _masked(product)
        if layer.bias is not None and layer.shared_bias:
            reject("exchange.torch_uncertainty", "model", "of layers with a bias per member", f"one bias at {path!r}")
        return _scales(product)

    return entries


def state_dict(model: nn.Module, *, first: Collection[str] = ()) -> dict[str, Tensor]:
    """The state of a layer or a model of this package's layers under torch-uncertainty's names and axis orders.

    =========================================  ========================================================================
    layer of :mod:`.nn`, of torch-uncertainty  names and axes there
    =========================================  ========================================================================
    `BatchEnsembleLinear`, `BatchLinear`       `linear.weight` `[O, I]`, `r_group` `[E, I]` scales inputs, `s_group`
                                               `[E, O]` outputs, `bias` `[E, O]`
    `BatchEnsembleConv2d`, `BatchConv2d`       `conv.weight`, `r_group`, `s_group`, `bias`
    the same two, `MaskedLinear`,              `mask.masks` `[E, I]` in float64, which is r; `linear` or `conv` with
    `MaskedConv2d`                             a bias that members share; s is 1
    `EnsembleLinear`, `PackedLinear`           `weight` `[E, O, I]`, or `[1, E*O, I]` of a first layer; `bias` `[E*O]`
    =========================================  ========================================================================

    A layer of BatchEnsemble whose r and s are not trained, with one bias for all members or none, is one of
    Masksembles.  Other modules keep their names.

    Args:
        model: as above; values are shared with it where no axis differs, as those of torch's `state_dict` are.
        first: the paths of those `EnsembleLinear` that are a `PackedLinear` of `first=True` ("" is the model itself).

    Returns:
        What `load_state_dict` of the module of torch-uncertainty takes; :func:`load_state_dict` is the inverse, with
        the same bits.

    Raises:
        TypeError: `model` is no module.
        ValueError: a layer of this package that torch-uncertainty has not (named, with its path), or a bias that
            members share beside scales that are trained.

    Example:
        >>> import torch, effens_kernels as ek
        >>> layer = ek.nn.BatchEnsembleLinear(8, 2, num_members=4, tiled=True)
        >>> {name: list(value.shape) for name, value in ek.exchange.torch_uncertainty.state_dict(layer).items()}
        {'linear.weight': [2, 8], 'r_group': [4, 8], 's_group': [4, 2], 'bias': [4, 2]}
    """
    op = "exchange.torch_uncertainty.state_dict"
    return _states.outward(op, model, _entries_of(op, model, first))


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, first: Collection[str] = ()) -> nn.Module:
    """Load the state of a layer or a model of torch-uncertainty into one of this package's layers, built alike.

    Args:
        model: see :func:`state_dict`; it is returned.
        state: all of the other model's, as read from a file; values go to the model's dtypes and devices.
        first: as in :func:`state_dict`.

    Raises:
        TypeError: `model` is no module, or `state` no mapping.
        ValueError: a name is missing or left over, or a shape differs; named, and before anything is loaded.

    Example:
        >>> import torch, effens_kernels as ek
        >>> state = {"linear.weight": torch.randn(2, 8), "r_group": torch.randn(4, 8), "s_group": torch.randn(4, 2)}
        >>> layer = ek.nn.BatchEnsembleLinear(8, 2, num_members=4, bias=False, tiled=True)
        >>> layer = ek.exchange.torch_uncertainty.load_state_dict(layer, state)
        >>> torch.equal(layer.r, state["r_group"])
        True
    """
    op = "exchange.torch_uncertainty.load_state_dict"
    model.load_state_dict(_states.inward(op, model, state, _entries_of(op, model, first)))
    return model


def from_layer(layer: nn.Module) -> nn.Module:
    """The layer of :mod:`effens_kernels.nn` with the values of a layer of torch-uncertainty.

    Args:
        layer: a `BatchLinear`, `BatchConv2d`, `MaskedLinear`, `MaskedConv2d` or `PackedLinear`.  Its dtype, device,
            `requires_grad` and mode are kept; parameters are copies.

    Returns:
        For the first four, a layer with `tiled=True`, which maps `[E*B, ...]` to `[E*B, ...]` as they do, but refuses
        rows that members cannot share evenly.  A `PackedLinear` has the features of all members in one axis: its
        `EnsembleLinear` maps `[B, E, I]` to `[B, E, O]`, with `I` and `O` of one member (`packed.unflatten(-1, (E,
        -1))`), or `[B, I]` where it is the first layer.  :func:`state_dict` gives its state back.

    Raises:
        TypeError: `layer` is no module.
        ValueError: a layer without a counterpart (named), as `PackedConv2d`; `BatchConv1d` and the transposed
            convolutions, which :func:`accelerate` takes; a `PackedLinear` with `gamma` other than 1 or
            `implementation="sparse"`; or a layer not of torch-uncertainty.

    Example:
        >>> class BatchLinear(torch.nn.Module):  # torch_uncertainty.layers.BatchLinear, in short
        ...     __module__ = "torch_uncertainty.layers"
        ...     def __init__(self, in_features, out_features, num_estimators):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(in_features, out_features, bias=False)
        ...         self.r_group = torch.nn.Parameter(torch.randn(num_estimators, in_features))
        ...         self.s_group = torch.nn.Parameter(torch.randn(num_estimators, out_features))
        ...         self.bias = torch.nn.Parameter(torch.randn(num_estimators, out_features))
        >>> theirs = BatchLinear(8, 2, num_estimators=4)
        >>> torch.equal(from_layer(theirs).s, theirs.s_group)
        True
    """
    op = "exchange.torch_uncertainty.from_layer"
    if not isinstance(layer, nn.Module):
        reject(op, "layer", "a torch.nn.Module", type(layer).__name__, TypeError)
    kind = type(layer).__name__
    if not is_of(layer, "torch_uncertainty") or kind not in _BUILD:
        reject(op, "layer", f"a layer of torch-uncertainty that has a counterpart ({', '.join(_BUILD)})", kind)
    with torch.device("meta"):
        ours, first = _BUILD[kind](op, layer), ("",) if getattr(layer, "groups", None) == 1 else ()
    return _states.fill(op, ours, layer, _entries_of(op, ours, first))


def _frozen(layer: nn.Module) -> nn.Module:
    layer.r.requires_grad_(False)
    layer.s.requires_grad_(False)
    return layer


def _linear(theirs: nn.Module, members: int, **options: bool) -> nn.Module:
    linear, activation = theirs.linear, getattr(theirs, "activation", None)  # of a layer that `accelerate` had
    sizes = linear.in_features, linear.out_features, members
    return BatchEnsembleLinear(*sizes, **options, activation=activation, tiled=True, dtype=linear.weight.dtype)


def _conv(theirs: nn.Module, members: int, **options: bool) -> nn.Module:
    conv = theirs.conv
    how = conv.stride, conv.padding, conv.dilation, conv.groups
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size, members
    return BatchEnsembleConv2d(*sizes, *how, **options, tiled=True, dtype=conv.weight.dtype)


def _packed(op: str, theirs: nn.Module) -> nn.Module:
    members, first = theirs.num_estimators, theirs.groups == 1
    if theirs.weight.layout is not torch.strided:
        reject(op, "layer", "a PackedLinear of dense weights", "implementation='sparse'")
    if theirs.groups not in (1, members):
        reject(op, "layer", "a PackedLinear with gamma=1", f"gamma={theirs.groups // members}")
    inputs, outputs = theirs.weight.shape[2], theirs.weight.shape[1] // (members if first else 1)
    bias = theirs.bias is not None
    return EnsembleLinear(inputs, outputs, members, bias, batch_first=True, dtype=theirs.weight.dtype)


_BUILD: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "BatchLinear": lambda op, m: _linear(m, len(m.r_group), bias=m.bias is not None),
    "BatchConv2d": lambda op, m: _conv(m, len(m.r_group), bias=m.bias is not None),
    "MaskedLinear": lambda op, m: _frozen(
        _linear(m, len(m.mask.masks), bias=m.linear.bias is not None, shared_bias=True)
    ),
    "MaskedConv2d": lambda op, m: _frozen(_conv(m, len(m.mask.masks), bias=m.conv.bias is not None, shared_bias=True)),
    "PackedLinear": _packed,
}


def _tiled(layer: nn.Module, x: Tensor, members: int, features: str) -> Tensor:
    return members_first(type(layer).__name__, x, members, False, features, tiled=True)


def _mask_scales(layer: nn.Module, outputs: int, x: Tensor) -> tuple[Tensor, Tensor]:
    masks = layer.mask.masks
    return masks.to(x.device, x.dtype), x.new_ones(len(masks), outputs)


class BatchLinear(Fusing):
    def forward(self, inputs: Tensor) -> Tensor:
        x = _tiled(self, inputs, len(self.r_group), "I")
        r, s = self.r_group, self.s_group
        return rank1_linear(x, self.linear.weight, r, s, self.bias, activation=self.activation).flatten(0, 1)


class MaskedLinear(Fusing):
    def forward(self, inputs: Tensor) -> Tensor:
        x, linear = _tiled(self, inputs, len(self.mask.masks), "I"), self.linear
        r, s = _mask_scales(self, linear.out_features, x)
        return rank1_linear(x, linear.weight, r, s, linear.bias, activation=self.activation).flatten(0, 1)


class BatchConv1d(Accelerated):
    def forward(self, inputs: Tensor) -> Tensor:
        x, conv = _tiled(self, inputs, len(self.r_group), "C, L"), self.conv
        how = conv.stride, conv.padding, conv.dilation, conv.groups
        return rank1_conv1d(x, conv.weight, self.r_group, self.s_group, self.bias, *how).flatten(0, 1)


class BatchConv2d(Accelerated):
    def forward(self, inputs: Tensor) -> Tensor:
        x, conv = _tiled(self, inputs, len(self.r_group), "C, H, W"), self.conv
        how = conv.stride, conv.padding, conv.dilation, conv.groups
        return rank1_conv2d(x, conv.weight, self.r_group, self.s_group, self.bias, *how).flatten(0, 1)


class BatchConvTranspose2d(Accelerated):
    def forward(self, inputs: Tensor) -> Tensor:
        x, conv = _tiled(self, inputs, len(self.r_group), "C, H, W"), self.conv_transpose
        how = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        return rank1_conv_transpose2d(x, conv.weight, self.r_group, self.s_group, self.bias, *how).flatten(0, 1)


class MaskedConv2d(Accelerated):
    def forward(self, inputs: Tensor) -> Tensor:
        x, conv = _tiled(self, inputs, len(self.mask.masks), "C, H, W"), self.conv
        how = conv.stride, conv.padding, conv.dilation, conv.groups
        r, s = _mask_scales(self, conv.out_channels, x)
        return rank1_conv2d(x, conv.weight, r, s, conv.bias, *how).flatten(0, 1)


class MaskedConvTranspose2d(Accelerated):
    def forward(self, inputs: Tensor) -> Tensor:
        x, conv = _tiled(self, inputs, len(self.mask.masks), "C, H, W"), self.conv
        how = conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        r, s = _mask_scales(self, conv.out_channels, x)
        return rank1_conv_transpose2d(x, conv.weight, r, s, conv.bias, *how).flatten(0, 1)


class PackedLinear(Accelerated):
    def forward(self, inputs: Tensor) -> Tensor:
        """[B, *, I of all groups] to [B, *, O of all groups], or of a last layer to [E*B, *, O]."""
        weight, groups = self.weight, self.groups
        if weight.layout is not torch.strided:
            y = inputs @ weight.transpose(0, 1)
            y = y if self.bias is None else y + self.bias
        elif groups == 1:
            y = F.linear(inputs, weight[0], self.bias)
        else:
            if inputs.dim() < 1 or inputs.shape[-1] != groups * weight.shape[2]:
                reject("PackedLinear", "inputs", f"[*, {groups * weight.shape[2]}]", inputs)
            x = inputs.reshape(-1, groups, weight.shape[2]).transpose(0, 1)
            bias = None if self.bias is None else self.bias.view(groups, -1)
            y = grouped_linear(x, weight, bias).transpose(0, 1).reshape(*inputs.shape[:-1], groups * weight.shape[1])
        return y.unflatten(-1, (self.num_estimators, -1)).movedim(-2, 0).flatten(0, 1) if self.last else y


_ACCELERATED: dict[str, type[Accelerated]] = {
    kind.__name__: kind
    for kind in (
        BatchLinear,
        BatchConv1d,
        BatchConv2d,
        BatchConvTranspose2d,
        MaskedLinear,
        MaskedConv2d,
        MaskedConvTranspose2d,
        PackedLinear,
    )
}


def accelerate(model: nn.Module) -> nn.Module:
    """Let a model with layers of torch-uncertainty compute with this package's kernels.

    Its `BatchLinear`, `BatchConv1d`, `BatchConv2d`, `BatchConvTranspose2d`, `MaskedLinear`, `MaskedConv2d`,
    `MaskedConvTranspose2d` and `PackedLinear` change their class.  Their parameters are the same objects under the same
    names: optimizers, `state_dict` and hooks stay.  An activation (`ReLU`, exact `GELU`, `SiLU`, `Tanh`) right after a
    `BatchLinear` or `MaskedLinear` in an `nn.Sequential`, where neither has hooks, is computed with it, and
    `nn.Identity` takes its place.  Everything else stays, as the grouped convolutions of `PackedConv2d`.

    Rows that members cannot share evenly are refused from then on; torch-uncertainty gives those of the remainder to
    the first members.  Under autocast, results are of its dtype, also where a bias of 32 bits is added.

    Args:
        model: changed in place, and returned; also inside its wrapper `torch_uncertainty.methods.BatchEnsemble`.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no layer of torch-uncertainty to accelerate in it.

    Example:
        >>> class BatchLinear(torch.nn.Module):  # torch_uncertainty.layers.BatchLinear, in short
        ...     __module__ = "torch_uncertainty.layers"
        ...     def __init__(self, in_features, out_features, num_estimators):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(in_features, out_features, bias=False)
        ...         self.r_group = torch.nn.Parameter(torch.randn(num_estimators, in_features))
        ...         self.s_group = torch.nn.Parameter(torch.randn(num_estimators, out_features))
        ...         self.bias = torch.nn.Parameter(torch.randn(num_estimators, out_features))
        >>> model = torch.nn.Sequential(BatchLinear(8, 64, num_estimators=4), torch.nn.ReLU())
        >>> accelerate(model)(torch.randn(4 * 32, 8)).shape
        torch.Size([128, 64])
    """
    return _accelerate("exchange.torch_uncertainty.accelerate", model, _ACCELERATED, "torch_uncertainty")
