"""What the optimizers of ensembles share: parameters and hyperparameters of E members, and which members are active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops._checks import DTYPES, reject
from ._per_member import PerMember, Range, per_member, plain


class EnsembleOptimizer(torch.optim.Optimizer):
    """Groups of parameters `[E, ...]` with hyperparameters of each member, and groups of parameters that they share.

    A subclass names its hyperparameters in `RANGES`, checks what depends on several in `_check_group`, and steps in
    `_step` on the parameters of a group that have gradients, of one dtype on one device.
    """

    RANGES: ClassVar[dict[str, Range]] = {}
    PAIRS: tuple[str, ...] = ()  # hyperparameters that are two

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        active: Tensor | Sequence[bool] | None,
        backend: str | None,
    ) -> None:
        self.num_members: int | None = None
        self.backend = backend
        super().__init__(params, {**defaults, "members": True, "active": active})

    # ------------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; `members=False` is a group of parameters that all members share."""
        super().add_param_group(param_group)
        group, before = self.param_groups.pop(), self.num_members  # until it is known to fit
        try:
            self._normalize(group)
            self._check_params(group)
        except (TypeError, ValueError):
            self.num_members = before
            raise
        self.param_groups.append(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "num_members": self.num_members, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called for a state that is loaded, which is checked before it replaces what is there."""
        self.__dict__.update((name, state[name]) for name in ("num_members", "backend") if name in state)
        for group in state["param_groups"]:
            group.setdefault("members", True)
            group.setdefault("active", None)
            self._normalize(group)
            steps = [self.num_members if group["members"] else 1]
            for p in group["params"]:
                own = state["state"].get(p, {})
                for name, value in own.items():
                    expected = steps if name == "step" else list(p.shape)
                    if list(value.shape) != expected:
                        reject(self._name, f"state {name!r}", f"{expected}", value)
                if "step" in own:  # wherever torch.load has put it
                    own["step"] = own["step"].to("cpu", torch.float64)
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch; hyperparameters of each member are plain tensors."""
        state = super().state_dict()
        groups = [{name: plain(value) for name, value in group.items()} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    @property
    def active(self) -> Tensor | None:
        """Which members are updated, bool `[E]`; None for all.  The others are as if `step` were not called.

        They keep their parameters and the optimizer's state, bit by bit, whatever their gradients.  What members share
        (`members=False`) is updated all the same.
        """
        return next((group["active"] for group in self.param_groups if group["members"]), None)

    @active.setter
    def active(self, members: Tensor | Sequence[bool] | None) -> None:
        members = self._check_active(members)
        self.defaults["active"] = members
        for group in self.param_groups:
            if group["members"]:
                group["active"] = members

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _normalize(self, group: dict[str, Any]) -> None:
        """Every hyperparameter as a float or as :class:`PerMember`, or an error in words."""
        for name, range in self.RANGES.items():
            if name in self.PAIRS:
                pair = group[name]
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    reject(self._name, name, "a pair", pair, TypeError)
                named = [(f"{name}[{n}]", value) for n, value in enumerate(pair)]
                group[name] = tuple(self._hyperparameter(n, value, range, group) for n, value in named)
            else:
                group[name] = self._hyperparameter(name, group[name], range, group)
        for name, value in group.items():  # what a scheduler keeps there
            if isinstance(value, Tensor) and not isinstance(value, PerMember) and value.is_floating_point():
                group[name] = PerMember.of(value) if value.dim() == 1 else value
        for flag in ("members", "maximize"):
            if not isinstance(group[flag], bool):
                reject(self._name, flag, "a bool", group[flag], TypeError)
        group["active"] = self._check_active(group["active"]) if group["members"] else None
        self._check_group(group)

    def _hyperparameter(self, name: str, value: object, range: Range, group: dict[str, Any]) -> object:
        value = per_member(self._name, name, value, range)
        if isinstance(value, PerMember):
            if not group["members"]:
                expected = "one number in a group of parameters that members share (members=False)"
                reject(self._name, name, expected, f"{len(value)} of them")
            self._check_count(name, len(value))
        return value

    def _check_count(self, name: str, count: int) -> None:
        if self.num_members is None:
            self.num_members = count
        if count != self.num_members:
            reject(self._name, name, f"of E={self.num_members} members", f"{count}")

    def _check_group(self, group: dict[str, Any]) -> None:
        """Of hyperparameters that depend on each other."""

    def _check_active(self, members: Tensor | Sequence[bool] | None) -> Tensor | None:
        if members is None:
            return None
        if not isinstance(members, Tensor):
            members = torch.tensor(members, device="cpu")
        if members.dtype != torch.bool:
            reject(self._name, "active", "None or bool [E]", members, TypeError)
        if members.dim() != 1 or len(members) == 0:
            reject(self._name, "active", "None or bool [E]", members)
        self._check_count("active", len(members))
        return members.detach().to("cpu", copy=True)

    def _check_params(self, group: dict[str, Any]) -> None:
        names = group.get("param_names")
        if len(set(group["params"])) < len(group["params"]):
            reject(self._name, "params", "different parameters", "one of them twice")
        for n, p in enumerate(group["params"]):
            name = f"parameter {names[n]!r}" if names else f"params[{n}]"
            if p.dtype not in DTYPES:
                reject(self._name, name, "of float32, float16, bfloat16 or float64", p, TypeError)
            if not group["members"]:
                continue
            if p.dim() == 0 or p.shape[0] == 0:
                reject(self._name, name, "[E, ...] (what members share goes in a group with members=False)", p)
            if self.num_members is None:
                self.num_members = p.shape[0]
            if p.shape[0] != self.num_members:
                expected = f"[E={self.num_members}, ...] (what members share goes in a group with members=False)"
                reject(self._name, name, expected, p)

    # ------------------------------------------------------------------------------------------------ steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, and return what `closure`, called first, returns.

        Raises:
            TypeError: a gradient that is sparse.
            ValueError: hyperparameters that do not fit; a backend that cannot run.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them before anything is computed
            self._normalize_changed(group)
            self._check_grads(group)
        for group in self.param_groups:
            for params in _alike(group["params"]):
                self._step(group, params, [p.grad for p in params])
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _normalize_changed(self, group: dict[str, Any]) -> None:
        """Again, only where the user has put something else in the group."""
        for name in self.RANGES:
            for value in group[name] if name in self.PAIRS else (group[name],):
                fits = isinstance(value, PerMember) and group["members"] and len(value) == self.num_members
                if not fits and type(value) is not float:
                    return self._normalize(group)

    def _check_grads(self, group: dict[str, Any]) -> None:
        for n, p in enumerate(group["params"]):
            if p.grad is None or (p.grad.layout is torch.strided and p.grad.dtype == p.dtype):
                continue
            name = f"the gradient of {group['param_names'][n]!r}" if "param_names" in group else f"params[{n}].grad"
            if p.grad.layout is not torch.strided:
                reject(self._name, name, "dense (strided)", f"layout {p.grad.layout}", TypeError)
            reject(self._name, name, f"of {p.dtype} like its parameter", p.grad, TypeError)

    def _active(self, group: dict[str, Any]) -> float | Tensor:
        """1 for each member that is updated, 0 for the others."""
        return 1.0 if group["active"] is None else group["active"].double()

    def _states(self, params: list[Tensor], names: Sequence[str], members: bool) -> Iterator[list[Tensor]]:
        """The numbers of steps, `[E]` or `[1]`, then of each name a tensor like each parameter."""
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros(self.num_members if members else 1, dtype=torch.float64, device="cpu")
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        for name in ("step", *names):
            yield [self.state[p][name] for p in params]

    def _count(self, steps: list[Tensor], active: float | Tensor) -> None:
        """One step more, of each active member."""
        for step in steps:
            step += active


def _alike(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Those with gradients, by dtype and device."""
    buckets: dict[tuple, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            buckets.setdefault((p.dtype, p.device), []).append(p)
    return buckets.values()
