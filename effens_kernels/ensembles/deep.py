"""Deep ensembles of whole models: copies whose weights are drawn anew, as one module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops._checks import reject
from ._surgery import Site, Sites
from .stack import StackedEnsemble, stack

# torch.nn's modules whose method to draw parameters anew is not public.
PRIVATE_RESET = (nn.MultiheadAttention, nn.Transformer)


def convert(
    sites: Sites,
    num_members: int,
    keep_first: bool = False,
    seeds: Sequence[int] | None = None,
    init: Callable[[nn.Module, int], object] | None = None,
    randomness: str = "different",
) -> StackedEnsemble:
    """A deep ensemble (Lakshminarayanan et al. 2017, section 2.4): E copies of a model, each initialized anew.

    Made by `effens_kernels.convert(model, "deep", num_members, ...)`, as :func:`effens_kernels.stack` makes one of E
    models; :func:`effens_kernels.unstack` gives them back.  Each module of a copy is drawn by its own
    `reset_parameters`, parts before what contains them, as constructors draw them.  Modules that `exclude` names or
    `include` does not keep the model's parameters and buffers, of which each member has a copy of its own, to be
    trained or not (`requires_grad` is the model's).  Buffers that `reset_parameters` does not set are copied too.

    Options of `convert`:
        keep_first: the first member is the model as it is.
        seeds: an integer for each member: member e is what `torch.manual_seed(seeds[e])` gives, whatever the others
            are, and PyTorch's random state stays as it was.  None draws from that state.
        init: called as `init(model, member)` with each new copy, after the resets, to draw what they do not draw as the
            model should have it.  With it, modules without `reset_parameters` are left to it.
        randomness: of dropout and the like, as in :func:`effens_kernels.stack`.

    Raises:
        ValueError: a module has parameters of its own and no `reset_parameters`, or a parametrization; what
            :func:`effens_kernels.stack` refuses; not E seeds.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "deep", num_members=3, seeds=[0, 1, 2])
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([3, 32, 4])
        >>> models = ek.unstack(ensemble)
    """
    _check_options(num_members, seeds, init)
    for site in sites.meant:
        check_reset(site, "init=... draws the others, exclude", init is not None)
    if not any(_resets(site.module) for site in sites.meant) and init is None:
        reject("convert", "model", "with modules to initialize anew", "one without")
    members = [copy.deepcopy(sites.model) for _ in range(num_members)]
    for e, member in enumerate(members):
        if e or not keep_first:
            with nullcontext() if seeds is None else _seeded(member, seeds[e]):
                reset(member, sites)
                if init is not None:
                    with torch.no_grad():
                        init(member, e)
    return stack(members, randomness=randomness)


def _check_options(num_members: int, seeds: object, init: object) -> None:
    if init is not None and not callable(init):
        reject("convert", "init", "None or a function of a model and a member's number", repr(init), TypeError)
    if seeds is not None:
        if not isinstance(seeds, Sequence) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
            reject("convert", "seeds", f"None or {num_members} ints", repr(seeds), TypeError)
        if len(seeds) != num_members:
            reject("convert", "seeds", f"{num_members} ints, one for each member", f"{len(seeds)}")


def check_reset(site: Site, others: str, has_init: bool = False) -> None:
    """Whether a module can be drawn anew, or `init` is there to do it; `others` says what else there is."""
    module, kind = site.module, type(site.module).__name__
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    hint = f"({others}=[{site.paths[0]!r}] keeps them)"
    if is_parametrized(module) and not has_init:
        reject("convert", "model", f"of modules without parametrizations {hint}", f"{kind} at {site} with one")
    if own and not _resets(module) and not has_init:
        expected = f"of modules with reset_parameters {hint}"
        reject("convert", "model", expected, f"{kind} at {site} with {', '.join(own)} and without")


def _resets(module: nn.Module) -> bool:
    return not is_parametrized(module) and (
        callable(getattr(module, "reset_parameters", None)) or isinstance(module, PRIVATE_RESET)
    )


@torch.no_grad()
def reset(member: nn.Module, sites: Sites) -> None:
    """Draw what is meant anew in a copy of the model; the rest stays, whatever a module that contains it resets."""
    meant = {id(site.module) for site in sites.meant}
    for plain, module in zip(_parts_first(sites.model), _parts_first(member)):
        if id(plain) in meant and _resets(module):
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
            else:
                module._reset_parameters()
    for plain, module in zip(sites.model.modules(), member.modules()):
        if id(plain) not in meant:
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    value.copy_(getattr(plain, name))


def _parts_first(module: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    seen = set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        for part in module.children():
            yield from _parts_first(part, seen)
        yield module


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of a seed, on the devices of the model too; afterwards the state is what it was."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device.index for device in devices)):
        torch.manual_seed(seed)
        yield
