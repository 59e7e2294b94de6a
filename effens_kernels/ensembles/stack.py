"""stack: trained models of one architecture as one module that runs them all; unstack gives them back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from ..ops._checks import reject
from ._alike import check_models
from ._dropout import PLAIN, give_own, take_own
from ._levels import is_result, mapped, of_member
from ._members import Fused, assign, explained, without_fast_paths
from ._sequential import fuse, unfuse

RANDOMNESS = ("different", "same")


class _Place(NamedTuple):
    """Where a member has a tensor, and that of all members."""

    path: str
    tensor: Tensor  # [E, ...], but for those that are shared
    plain: dict[str, Tensor | None]  # of the member's module
    name: str  # there
    is_buffer: bool


class _Part(nn.Module):
    """The parameters and buffers of one module, all members' together, under the names of that module."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        # Not registered: it has the member's code and options, and the values of no member.
        self.__dict__["_plain"] = plain

    def __getitem__(self, key: int | str) -> _Part:
        """Of members' `module[key]`, as nn.Sequential, nn.ModuleList and nn.ModuleDict understand it."""
        below = self._plain[key]
        for name, part in self._modules.items():
            if part is not None and part._plain is below:
                return self._modules[name]
        raise TypeError(f"{type(self).__name__}: {key!r} should name one module of {self._plain._get_name()}")

    def train(self, mode: bool = True) -> _Part:
        self._plain.train(mode)  # which may have ideas of its own about its parts
        for part in self.modules():
            part.training = part._plain.training
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> _Part:
        """As in torch.nn; a probability stays what it is, in whatever dtype the models are to compute."""
        rates = self._buffers.get("p") if type(self._plain) in PLAIN else None
        super()._apply(fn, recurse)
        if rates is not None:
            self._buffers["p"] = rates.to(self._buffers["p"].device)
        return self


class StackedEnsemble(_Part):
    """Models of one architecture as one module, as :func:`effens_kernels.stack` makes it.

    .. math:: y_e = f(x_e;\\, \\theta_e), \\qquad e = 1 \\dots E

    with f the forward code of the members' class, run once by `torch.func.vmap` for all of them.  Linear layers,
    wherever the code has them, are one call of :func:`effens_kernels.grouped_linear`; convolutions and recurrent layers
    are one call per member, attention one call for the rows of all members, and everything else is mapped by
    torch.func's rules.

    Parameters and buffers have the names that they have in a member, with the axis of members in front: `[E, ...]`.
    They are ordinary ones, for optimizers, `state_dict`, `.to` and so on; what members tie stays tied.

    `forward(*args, per_member=False, member=None, **kwargs)` takes a member's arguments.  Every member gets the same
    tensors, or with `per_member=True` tensors `[E, ...]` of which each gets its own (those without axes are shared all
    the same).  Every tensor in the model's result comes back as `[E, ...]`, in tuples, lists and dicts as the model
    arranges them; other values as the model gives them.  With `member=e` that member alone runs, on its own arguments,
    as plain PyTorch; negative numbers count from the end.  Running statistics are updated as in the members.

    Where members' Dropout, Dropout1d, 2d or 3d differ in `p`, each drops by its own, and the module of that path has a
    buffer `p` `[E]`, which is in no `state_dict`.

    `train()` and `eval()` work as in the members, also on a part: `ensemble.layers[1]` of members' `layers[1]` is a
    module that holds its parameters, and no more.

    Raises:
        RuntimeError: the members' code does what cannot be done for all members at once: it takes values out of PyTorch
            (`.item()`, `.numpy()`), goes where values lead (`if x.sum() > 0`), makes shapes of values (`x[x > 0]`),
            writes into what members share, calls an operation without a rule.  Named are the module, and why.
        ValueError: a per-member input is not `[E, ...]`.

    Attributes:
        num_members: E.
        randomness: "different" or "same", what dropout and the like do to members.
        has_trunk: whether members have a part of the model in common, as in :class:`SubEnsemble`.
        shared: names of the parameters and buffers of that, which are without the axis of members.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ensemble = ek.stack([torch.nn.Linear(8, 4) for _ in range(5)])
        >>> ensemble.weight.shape
        torch.Size([5, 4, 8])
        >>> x = torch.randn(32, 8)
        >>> torch.allclose(ensemble(x)[2], ensemble(x, member=2), atol=1e-5)
        True
        >>> ensemble(torch.randn(5, 32, 8), per_member=True).shape
        torch.Size([5, 32, 4])
    """

    def __init__(self, plain: nn.Module, num_members: int, randomness: str) -> None:
        super().__init__(plain)
        self.num_members, self.randomness = num_members, randomness
        self.has_trunk, self.shared = False, frozenset()

    def forward(self, *args: object, per_member: bool = False, member: int | None = None, **kwargs: object) -> object:
        if member is not None:
            return self._alone(member, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        dims = [0 if per_member and isinstance(t, Tensor) and t.dim() else None for t in leaves]
        for t, dim in zip(leaves, dims):
            if dim is not None and t.shape[0] != self.num_members:
                reject("StackedEnsemble", "input", f"[E={self.num_members}, ...] with per_member=True", t)
        if torch.compiler.is_compiling():
            before = assign(without_fast_paths(self._plain))
            result = self._together(leaves, spec, dims)
            assign(before)
            return result
        try:
            return self._together(leaves, spec, dims)
        except RuntimeError as error:
            raise explained(error, self._plain, "convert" if self.has_trunk else "stack") from error

    def _together(self, leaves: list[object], spec: pytree.TreeSpec, dims: list[int | None]) -> object:
        places = self._places()
        training = torch.is_grad_enabled() and any(place.tensor.requires_grad for place in places)
        mode = Fused(self.num_members, training, self.has_trunk)
        found: list[object] = []  # what is not mapped: the result without its tensors, and places

        def run(*values: object) -> list[Tensor]:
            args, kwargs = pytree.tree_unflatten(values[len(places) :], spec)
            with mode:
                y, after = self._called(places, values, args, kwargs)
            values_of, arrangement = pytree.tree_flatten(y)
            tensors = [isinstance(v, Tensor) for v in values_of]
            assigned = [n for n, place in enumerate(places) if place.is_buffer and after[n] is not values[n]]
            found.extend((arrangement, tensors, [None if t else v for v, t in zip(values_of, tensors)], assigned))
            return [v for v, t in zip(values_of, tensors) if t] + [after[n] for n in assigned]

        axes = [*(None if place.path in self.shared else 0 for place in places), *dims]
        arguments = [*(place.tensor for place in places), *leaves]
        if torch.compiler.is_compiling():
            results = vmap(run, tuple(axes), randomness=self.randomness)(*arguments)
        else:
            results = mapped(run, axes, arguments, self.num_members, self.randomness)
        results = iter(results)
        arrangement, tensors, values, assigned = found
        values = [next(results) if t else v for v, t in zip(values, tensors)]
        with torch.no_grad():  # what the members' code assigned to buffers, rather than to change them in place
            for n, value in zip(assigned, results):
                places[n].tensor.copy_(self._common(places[n].path, value))
        return pytree.tree_unflatten(values, arrangement)

    def _called(
        self, places: list[_Place], values: Sequence[object], args: tuple, kwargs: dict[str, object]
    ) -> tuple[object, list[Tensor]]:
        """What the member's code gives with these values in their places, and what is in the places then."""
        if torch.compiler.is_compiling():
            state = {place.path: value for place, value in zip(places, values)}
            y = functional_call(self._plain, state, args, kwargs, tie_weights=False)
            return y, [state[place.path] for place in places]
        before = [place.plain[place.name] for place in places]
        try:
            for place, value in zip(places, values):
                place.plain[place.name] = value
            y = self._plain(*args, **kwargs)
            return y, [place.plain[place.name] for place in places]
        finally:
            for place, value in zip(places, before):
                place.plain[place.name] = value

    def _places(self) -> list[_Place]:
        """Each place of a tensor once, where its module is first: what is tied is in several.

        functional_call, if it is to tie them, puts back the wrong tensors where a module has two names (torch 2.13).
        """
        return [
            _Place(f"{path}.{name}" if path else name, tensor, plain, name, own is part._buffers)
            for path, part in self.named_modules()
            for own, plain in (
                (part._parameters, part._plain._parameters),
                (part._buffers, part._plain._buffers),
            )
            for name, tensor in own.items()
            if tensor is not None
        ]

    def _alone(self, member: int, args: tuple, kwargs: dict[str, object]) -> object:
        if isinstance(member, bool) or not isinstance(member, int):
            reject("StackedEnsemble", "member", "None or an int", repr(member), TypeError)
        if not -self.num_members <= member < self.num_members:
            expected = f"in [-{self.num_members}, {self.num_members})"
            reject("StackedEnsemble", "member", expected, repr(member), IndexError)
        parameters, buffers = (
            {n: t if n in self.shared else t[member] for n, t in self._state(k).items()}
            for k in ("_parameters", "_buffers")
        )
        state = {**parameters, **buffers}
        result = functional_call(self._plain, state, args, kwargs, tie_weights=False)
        _keep(buffers, {name: state[name] for name in buffers if state[name] is not buffers[name]})
        return result

    @torch.no_grad()
    def to(self, *args: object, memory_format: torch.memory_format | None = None, **kwargs: object) -> StackedEnsemble:
        """As in torch.nn, with a memory format that of each member's tensors."""
        if args or kwargs:
            super().to(*args, **kwargs)
        if memory_format is not None:
            for name, t in (*self._state("_parameters").items(), *self._state("_buffers").items()):
                axes = t.dim() - (name not in self.shared)
                if axes != {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, axes):
                    continue
                if name in self.shared:
                    t.data = t.contiguous(memory_format=memory_format)
                else:
                    t.data = _stacked([own.contiguous(memory_format=memory_format) for own in t.unbind()])
        return self

    def _common(self, name: str, value: Tensor) -> Tensor:
        """What members assigned to a buffer, [E, ...]: to a shared one the same, which vmap has expanded."""
        if name not in self.shared:
            return value
        if value.dim() > 0 and self.num_members > 1 and value.stride(0) != 0:
            reason = "it writes values of each member into a tensor that all members share"
            raise RuntimeError(f"convert: {name} cannot be assigned for all members at once, since {reason}")
        return value[0]

    def _state(self, kind: str) -> dict[str, Tensor]:
        return {p.path: p.tensor for p in self._places() if p.is_buffer == (kind == "_buffers")}

    def __repr__(self) -> str:
        plain = repr(self._plain).replace("\n", "\n  ")
        return f"StackedEnsemble(\n  num_members={self.num_members}, each\n  {plain}\n)"


@torch.no_grad()
def _keep(buffers: dict[str, Tensor], assigned: dict[str, Tensor]) -> None:
    """What the members' code assigned to buffers, rather than to change them in place."""
    for name, value in assigned.items():
        buffers[name].copy_(value)


@torch.no_grad()
def stack(models: Sequence[nn.Module], *, randomness: str = "different") -> StackedEnsemble:
    """One module that runs all of `models`, which are of one architecture, in one call per layer; nothing is lost.

    .. math:: y_e = f(x_e;\\, \\theta_e), \\qquad e = 1 \\dots E

    Args:
        models: a list of E models of one class, whose modules have the same options; parameters and buffers have the
            same names, shapes and dtypes; only `p` of Dropout may differ.  They are copied and stay as they are.
        randomness: whether dropout and other random calls are "different" in each member, or the "same" in all.

    Returns:
        A :class:`StackedEnsemble`, which maps `[B, ...]`, the same for all members, or with `per_member=True`
        `[E, B, ...]`, to `[E, B, ...]`.

    Raises:
        TypeError: no list of modules.
        ValueError: no models; models that differ, of which the first difference is named with its path; models that
            share a parameter; modules with hooks, and lazy, quantized, TorchScript, compiled or wrapped ones; modules
            or parameters in plain attributes.

    Example:
        >>> import torch, effens_kernels as ek
        >>> models = [torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()) for _ in range(5)]
        >>> ensemble = ek.stack(models)
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([5, 32, 16])
        >>> len(ek.unstack(ensemble))
        5
    """
    check_models(models)
    if not isinstance(randomness, str) or randomness not in RANDOMNESS:
        reject("stack", "randomness", f"one of {', '.join(map(repr, RANDOMNESS))}", repr(randomness))
    return assembled(models, randomness)


@torch.no_grad()
def assembled(
    models: Sequence[nn.Module],
    randomness: str = "different",
    trunk: Sequence[Tensor] | None = None,
    stacked: dict[int, Tensor] | None = None,
) -> StackedEnsemble:
    """What `stack` makes of models that have been checked; one model several times is members with equal values.

    The tensors of a `trunk` are one object in all models, and become one.  `stacked` has, by the id of a tensor of the
    first model, the members' values `[E, ...]` where these exist already.
    """
    plain = copied(models[0], lambda tensor: torch.empty_like(tensor, device="meta"))
    fuse(plain)
    ensemble = StackedEnsemble(plain, len(models), randomness)
    common = {id(tensor): _like(tensor, tensor.clone()) for tensor in trunk or ()}
    held = {id(tensor) for tensor in common.values()}
    _fill(ensemble, list(models), {id(plain): ensemble}, common | (stacked or {}))
    give_own(ensemble, plain, models)
    state = (*ensemble._state("_parameters").items(), *ensemble._state("_buffers").items())
    ensemble.has_trunk = trunk is not None
    ensemble.shared = frozenset(name for name, tensor in state if id(tensor) in held)
    return ensemble


def copied(model: nn.Module, values: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose parameters and buffers have the `values` of those of the model."""
    memo: dict[int, object] = {id(t): _like(t, values(t)) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _fill(part: _Part, plain: list[nn.Module], parts: dict[int, _Part], stacked: dict[int, Tensor]) -> None:
    """The tensors of `plain`, one module of each member, and of all below them, into the part for these.

    What a member has under several names is one object there (`parts` and `stacked`), and so it is here.
    """
    part.training = part._plain.training
    for own, theirs in ((part._parameters, "_parameters"), (part._buffers, "_buffers")):
        for name, first in getattr(plain[0], theirs).items():
            if first is not None and id(first) not in stacked:
                stacked[id(first)] = _like(first, _stacked([getattr(module, theirs)[name] for module in plain]))
            own[name] = None if first is None else stacked[id(first)]
    part._non_persistent_buffers_set |= plain[0]._non_persistent_buffers_set
    for name, below in part._plain._modules.items():
        if below is None:
            part._modules[name] = None
            continue
        new = id(below) not in parts
        part._modules[name] = parts.setdefault(id(below), _Part(below))
        if new:
            _fill(parts[id(below)], [module._modules[name] for module in plain], parts, stacked)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """[E, ...], each laid out as it is."""
    result = empty_rows(tensors[0], len(tensors))
    for e, tensor in enumerate(tensors):
        result[e].copy_(tensor)
    return result


def empty_rows(first: Tensor, count: int, **options: object) -> Tensor:
    """[count, ...] without values, each row dense and laid out as `first`: channels_last and the like."""
    dense = torch.empty_like(first).stride()
    return first.new_empty_strided((count, *first.shape), (first.numel(), *dense), **options)


def _like(first: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, first.requires_grad) if isinstance(first, nn.Parameter) else values


@torch.no_grad()
def unstack(model: StackedEnsemble) -> list[nn.Module]:
    """The members of an ensemble as models of their own class, with the same bits.

    Args:
        model: what :func:`effens_kernels.stack` made, trained since or not.

    Returns:
        E models that share no memory with the ensemble or each other, running statistics included, on its device, in
        its dtype and mode.

    Raises:
        TypeError: `model` is not a :class:`StackedEnsemble`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> models = [torch.nn.Linear(8, 4) for _ in range(3)]
        >>> again = ek.unstack(ek.stack(models))
        >>> all(torch.equal(a.weight, b.weight) for a, b in zip(models, again))
        True
    """
    if not isinstance(model, StackedEnsemble):
        hint = " (unstack its .module)" if isinstance(getattr(model, "module", None), StackedEnsemble) else ""
        hint = " (unstack its ._orig_mod)" if hasattr(model, "_orig_mod") else hint
        reject("unstack", "model", "a StackedEnsemble", f"{type(model).__name__}{hint}", TypeError)
    return [member_of(model, e) for e in range(model.num_members)]


@torch.no_grad()
def member_of(ensemble: StackedEnsemble, e: int) -> nn.Module:
    kept = pytree.tree_leaves([vars(module) for module in ensemble._plain.modules()])
    memo: dict[int, object] = {id(t): of_member(t, e) for t in kept if isinstance(t, Tensor) and is_result(t)}
    for path, part in ensemble.named_modules():
        for own, plain in ((part._parameters, part._plain._parameters), (part._buffers, part._plain._buffers)):
            for name, stacked in own.items():
                if stacked is not None and id(plain[name]) not in memo:
                    common = (f"{path}.{name}" if path else name) in ensemble.shared
                    memo[id(plain[name])] = _like(stacked, (stacked if common else stacked[e]).clone())
    return take_own(unfuse(copy.deepcopy(ensemble._plain, memo)))
