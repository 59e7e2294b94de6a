"""What all methods need to take a model apart: modules with their paths, which are meant, and replacement."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops._checks import reject

Pattern = str | type

# Their parameters act on each row alone, so that members may share them.
SHARED_AS_THEY_ARE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding)
# Of layers that have others than a weight and a bias.
PARAMETERS = {
    nn.MultiheadAttention: {f"{part}_proj_weight" for part in ("in", "q", "k", "v")}
    | {"in_proj_bias", "bias_k", "bias_v"}
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Site(NamedTuple):
    """A module of the model and where it is; the first path of one that is used several times names it."""

    module: nn.Module
    paths: list[str]

    def __str__(self) -> str:
        return repr(self.paths[0] or "the model itself")


class Sites:
    """The modules of a model, each once, in the order of registration, and which of them are to be converted."""

    def __init__(
        self, model: nn.Module, include: Pattern | Iterable[Pattern] | None, exclude: Pattern | Iterable[Pattern]
    ) -> None:
        self.model = model
        found: dict[int, Site] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            found.setdefault(id(module), Site(module, [])).paths.append(path)
        self.all = list(found.values())
        for site in self.all:
            if is_ours(site.module):
                reject("convert", "model", "plain", f"{type(site.module).__name__} at {site}")
        meant = self._matching("include", include) if include is not None else self.all
        left = {id(site.module) for site in self._matching("exclude", exclude)}
        self.meant = [site for site in meant if id(site.module) not in left]

    def _matching(self, argument: str, patterns: Pattern | Iterable[Pattern]) -> list[Site]:
        chosen: set[int] = set()
        for pattern in [patterns] if isinstance(patterns, Pattern) else patterns:
            if not isinstance(pattern, Pattern):
                reject("convert", argument, "types and paths of modules", repr(pattern), TypeError)
            hits = {id(site.module) for site in self.all if _matches(pattern, site)}
            if not hits:
                reject("convert", argument, "types and paths of modules in the model", f"{pattern!r}, which is not")
            chosen |= hits
        for site in self.all:  # attention reads the parameters of a part of its, which goes with it
            if isinstance(site.module, nn.MultiheadAttention):
                part = id(site.module.out_proj)
                chosen = chosen | {part} if id(site.module) in chosen else chosen - {part}
        return [site for site in self.all if id(site.module) in chosen]

    def of(self, types: Sequence[type[nn.Module]], one_weight: Sequence[type[nn.Module]] = ()) -> list[Site]:
        """The modules to convert of exactly these types; whatever else is to be converted and cannot be is refused.

        In types of `one_weight`, `weight` will be a parameter of that shape that all members have, and may be tied.
        """
        chosen = [site for site in self.meant if type(site.module) in types]
        names = ", ".join(t.__name__ for t in types)
        for site in self.meant:
            module = site.module
            if type(module) in types:
                check_layer(site)
            elif _mixes_rows(module) or _has_parameters(module):
                if type(module) not in (*SHARED_AS_THEY_ARE, NonDynamicallyQuantizableLinear):
                    hint = f"(exclude=[{site.paths[0]!r}] shares it as it is)"
                    expected = f"made of {names} and modules without parameters {hint}"
                    reject("convert", "model", expected, f"{type(module).__name__} at {site}")
        self.refuse_ties(chosen, one_weight)
        return chosen

    def refuse_ties(self, chosen: list[Site], one_weight: Sequence[type[nn.Module]] = ()) -> None:
        """A parameter of two modules cannot become two layers' own."""
        replaced = {id(module) for site in chosen for module in site.module.modules()}

        def stays(site: Site, name: str) -> bool:
            return id(site.module) not in replaced or (name == "weight" and type(site.module) in one_weight)

        owner: dict[int, tuple[Site, str]] = {}
        for site in self.all:
            for name, parameter in site.module._parameters.items():
                other, its = owner.setdefault(id(parameter), (site, name))
                if parameter is None or other is site or (stays(site, name) and stays(other, its)):
                    continue
                expected = "of layers whose parameters are their own (exclude both to share them as they are)"
                reject("convert", "model", expected, f"{name} of {site} tied to {other}")


def check_layer(site: Site) -> None:
    """Refuse a layer of which another one cannot take the place."""
    module, kind = site.module, type(site.module).__name__
    if any(getattr(module, hooks) for hooks in _HOOKS):
        reject("convert", "model", "without hooks on layers to be replaced", f"{kind} at {site} with hooks")
    if not set(module._parameters) <= PARAMETERS.get(type(module), {"weight", "bias"}):
        own = ", ".join(module._parameters)
        reject("convert", "model", "of layers with a weight and a bias", f"{kind} at {site} with {own}")
    for name, part in module.named_children():  # which goes with it
        if type(part) is not NonDynamicallyQuantizableLinear or set(part._parameters) != {"weight", "bias"}:
            path = f"{site.paths[0]}.{name}".lstrip(".")
            reject("convert", "model", "of layers as torch.nn makes them", f"{type(part).__name__} at {path!r}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's and DataParallel's, in any order."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def is_ours(module: nn.Module) -> bool:
    """A layer or an ensemble of this package."""
    return type(module).__module__.startswith(f"{__package__.partition('.')[0]}.")


def replaced(model: nn.Module, by: dict[nn.Module | Tensor, nn.Module | Tensor]) -> nn.Module:
    """A copy of the model with some modules or parameters replaced, wherever they are referred to.

    What replaces them is not copied.
    """
    memo: dict[int, object] = {id(old): new for old, new in by.items()}
    model = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            _without_fast_path(module)
    return model


def _without_fast_path(module: nn.Module) -> None:
    """In inference, torch.nn's encoders read the parameters of their layers, and run kernels for one member."""
    if not any(map(is_ours, module.modules())):
        return
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    else:
        module.activation_relu_or_gelu = 0


def _matches(pattern: Pattern, site: Site) -> bool:
    if isinstance(pattern, type):
        return isinstance(site.module, pattern)
    ends = (pattern, f"{pattern}.*")  # a module, and what is inside it
    return any(fnmatchcase(path, end) for path in site.paths for end in ends)


def _mixes_rows(module: nn.Module) -> bool:
    """Statistics of a batch, or kept of batches, would be of all members together."""
    return isinstance(module, _BatchNorm) or getattr(module, "track_running_stats", False)


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())
