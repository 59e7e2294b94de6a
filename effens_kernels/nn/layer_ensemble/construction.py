"""From modules to layers of options: what callers may give, plain models taken apart, sizes that have to chain."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...ops._checks import reject
from .._layout import positive

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)  # with parameters, but no layers of their own
# What leaves the number of features (the last axis) or of channels (the second) as it is.
_KEEPS = (*_NORMS, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLING = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def read_layers(layers: Iterable[nn.Module | Sequence[nn.Module]]) -> list[list[nn.Module]]:
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
        reject("LayerEnsemble", "layers", "a sequence of layers (or use from_model)", type(layers).__name__, TypeError)
    found: list[list[nn.Module]] = []
    owner: dict[int, str] = {}
    for n, given in enumerate(layers):
        single = isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList)
        options = [given] if single else list(given) if isinstance(given, Iterable) else [None]
        if not options:
            reject("LayerEnsemble", f"layer {n}", "at least one option", "none")
        for k, option in enumerate(options):
            place = f"layer {n}, option {k}"
            if not isinstance(option, nn.Module):
                got = type(given if options == [None] else option).__name__
                reject("LayerEnsemble", place, "a torch.nn.Module", got, TypeError)
            for parameter in option.parameters():
                if owner.setdefault(id(parameter), place) != place:
                    expected = "of parameters of its own, since options are copied"
                    reject("LayerEnsemble", place, expected, f"one of {owner[id(parameter)]}")
        found.append(options)
    if not found:
        reject("LayerEnsemble", "layers", "at least one", "none")
    return found


def layers_of(model: nn.Sequential) -> list[nn.Module]:
    """A module with parameters and what follows it, up to the next; nested Sequentials count as their modules."""
    if not isinstance(model, nn.Sequential):
        reject("LayerEnsemble", "model", "a torch.nn.Sequential", type(model).__name__, TypeError)
    groups: list[list[nn.Module]] = [[]]
    begun = False
    for module in _flat(model):
        if any(True for _ in module.parameters()) and not isinstance(module, _NORMS):
            if begun:
                groups.append([])
            begun = True
        groups[-1].append(module)
    if not begun:
        reject("LayerEnsemble", "model", "of at least one module with parameters", "none")
    return [group[0] if len(group) == 1 else sequential(group, model.training) for group in groups]


def options_per_layer(num_options: int | Sequence[int], layers: int) -> list[int]:
    name = "LayerEnsemble.from_model"
    if isinstance(num_options, int):
        positive(name, num_options=num_options)
        return [num_options] * layers
    if not isinstance(num_options, Sequence) or isinstance(num_options, str):
        reject(name, "num_options", "an int, or one for each layer", repr(num_options), TypeError)
    if len(num_options) != layers:
        reject(name, "num_options", f"an int, or one for each of {layers} layers", repr(num_options))
    for count in num_options:
        positive(name, num_options=count)
    return list(num_options)


def fresh_copy(module: nn.Module) -> nn.Module:
    """With other random parameters, drawn as its modules do."""
    module = copy.deepcopy(module)
    for path, inner in module.named_modules():
        own = [p for p in inner._parameters.values() if p is not None]
        if hasattr(inner, "reset_parameters"):
            inner.reset_parameters()
        elif own:
            kind = type(inner).__name__
            reject("LayerEnsemble", "model", "of modules that have reset_parameters()", f"{kind} at {path!r}")
    return module


def check_chain(layers: list[list[nn.Module]]) -> None:
    """Refuse sizes that cannot fit where modules tell them; what they do not tell shows when the model runs."""
    before: tuple[str, int] | None = None
    for n, options in enumerate(layers):
        ends = [_ends(option) for option in options]
        for k, (start, end) in enumerate(ends):
            place = f"layer {n}, option {k}"
            if start and before and start[0] == before[0] and start[1] != before[1]:
                expected = f"a layer of {before[1]} input {start[0]}, as layer {n - 1} gives"
                reject("LayerEnsemble", place, expected, f"one of {start[1]}")
            for mine, first, what in ((start, ends[0][0], "input"), (end, ends[0][1], "output")):
                if mine and first and mine != first:
                    expected = f"a layer of {first[1]} {what} {first[0]}, as option 0"
                    reject("LayerEnsemble", place, expected, f"one of {mine[1]} {mine[0]}")
        before = ends[0][1]


def sequential(modules: Iterable[nn.Module], training: bool) -> nn.Sequential:
    """In this mode itself; `train` would also change that of its modules."""
    model = nn.Sequential(*modules)
    model.training = training
    return model


def _flat(module: nn.Module) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        return [inner for child in module for inner in _flat(child)]
    return [module]


def _ends(option: nn.Module) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """What an option takes and gives, ("features", I) or ("channels", C), where its modules tell."""
    start = end = None
    begins = True  # nothing has changed the input yet
    for module in _flat(option):
        kind = type(module)
        if kind is nn.Linear:
            takes, end = ("features", module.in_features), ("features", module.out_features)
        elif kind in _CONVOLUTIONS:
            takes, end = ("channels", module.in_channels), ("channels", module.out_channels)
        elif isinstance(module, _POOLING):
            end = end if end and end[0] == "channels" else None
            begins = False
            continue
        elif isinstance(module, _KEEPS) or (
            kind.__module__ == "torch.nn.modules.activation" and not list(module.parameters())
        ):
            continue
        else:
            end, begins = None, False
            continue
        if begins:
            start, begins = takes, False
    return start, end
