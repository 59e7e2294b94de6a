"""Which members of a hyperparameter ensemble to keep: greedy selection by validation loss, and stopping early."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import inf, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import check_tensor, reject
from .stack import StackedEnsemble, member_of, stack

__all__ = ["EarlyStopping", "Selection", "select_members", "take_members"]


class Selection(NamedTuple):
    """What :func:`select_members` chose.

    Attributes:
        members: `[n]`, indices in the order of selection; a member that is there k times counts k times.
        losses: `[n]`, the negative log-likelihood of the first 1, 2, ... of these, in nats.

    Example:
        >>> import torch, effens_kernels as ek
        >>> found = ek.ensembles.Selection(torch.tensor([3, 0, 3]), torch.tensor([0.5, 0.4, 0.3]))
        >>> found.unique, found.weights
        (tensor([0, 3]), tensor([0.3333, 0.6667]))
    """

    members: Tensor
    losses: Tensor

    @property
    def unique(self) -> Tensor:
        """The members that are there, each once, in ascending order."""
        return self.members.unique()

    @property
    def weights(self) -> Tensor:
        """How much each of `unique` counts; they sum to 1."""
        return self.members.unique(return_counts=True)[1] / len(self.members)


@torch.no_grad()
def select_members(losses: Tensor, num_members: int, *, replacement: bool = True) -> Selection:
    r"""The members that together predict validation data best, added one by one.

    .. math:: S \leftarrow S \cup \Bigl\{\arg\min_j \; -\frac{1}{B} \sum_b \log
              \frac{p_{jb} + \sum_{i \in S} p_{ib}}{|S| + 1}\Bigr\}

    where :math:`p_{jb}` is the likelihood of row b under member j: greedy forward selection by the loss of the mean
    prediction (Caruana et al. 2004, "Ensemble Selection from Libraries of Models", section 2), which ends when
    `num_members` different members are chosen or no candidate lowers the loss (Wenzel et al. 2020, "Hyperparameter
    Ensembles for Robustness and Uncertainty Quantification", algorithm 1).

    Args:
        losses: `[M, B]`, the negative log-likelihood of each row under each of M candidates: what
            `ek.losses.ensemble_cross_entropy` and `ensemble_gaussian_nll(..., full=True)` give with
            `reduction="none"`.
        num_members: how many different members at most.
        replacement: whether a member may be chosen again, and count more.

    Returns:
        A :class:`Selection`, of at least one member.  Of equal candidates the first is taken, NaN counts as the worst.

    Sums are of likelihoods, kept as logarithms in float64, so that none underflows.  A step costs O(M B), whatever the
    number of classes.

    Raises:
        TypeError: losses are no tensor or of an unsupported dtype, num_members is no int.
        ValueError: losses are not `[M, B]`, or empty; num_members is not from 1 to M.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ensemble, y = ek.stack([torch.nn.Linear(8, 3) for _ in range(10)]), torch.randint(3, (100,))
        >>> losses = ek.losses.ensemble_cross_entropy(ensemble(torch.randn(100, 8)), y, reduction="none")
        >>> chosen = ek.ensembles.select_members(losses, 4)
        >>> best = ek.ensembles.take_members(ensemble, chosen.unique)
    """
    op = "select_members"
    check_tensor(op, "losses", losses)
    if losses.dim() != 2 or not losses.numel():
        reject(op, "losses", "[M, B] of at least one candidate and row", losses)
    if isinstance(num_members, bool) or not isinstance(num_members, int):
        reject(op, "num_members", "an int", repr(num_members), TypeError)
    if not 1 <= num_members <= len(losses):
        reject(op, "num_members", f"1 to M={len(losses)}", repr(num_members))

    likelihoods = -losses.double()  # logarithms
    total = torch.full_like(likelihoods[0], -inf)
    allowed = torch.ones(len(losses), dtype=torch.bool, device=losses.device)
    members, found = [], []
    while len(set(members)) < num_members and bool(allowed.any()):
        loss = log(len(members) + 1) - torch.logaddexp(total, likelihoods).mean(1)
        loss = loss.nan_to_num(nan=inf).masked_fill(~allowed, inf)
        best = int(loss.argmin())
        if members and not loss[best] < found[-1]:
            break
        if not replacement:
            allowed[best] = False
        total = torch.logaddexp(total, likelihoods[best])
        members.append(best)
        found.append(loss[best])
    return Selection(torch.tensor(members, device=losses.device), torch.stack(found))


@torch.no_grad()
def take_members(
    ensemble: StackedEnsemble,
    members: Tensor | Sequence[int],
    optimizer: torch.optim.Optimizer | None = None,
) -> StackedEnsemble:
    """An ensemble of some members, with copies of their values, in the order given.

    Args:
        ensemble: what :func:`effens_kernels.stack` made.
        members: their indices, or bool `[E]`, as `optimizer.active` and `EarlyStopping.active` are.
        optimizer: one that trains the ensemble's parameters: its states and its hyperparameters of each member are
            reduced to these members, in place, and it goes on with the new ensemble's parameters.

    Raises:
        TypeError: not a :class:`StackedEnsemble`, indices of another type.
        ValueError: no members; an index out of range; an optimizer that trains something else.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ensemble = ek.stack([torch.nn.Linear(8, 3) for _ in range(5)])
        >>> optimizer = ek.optim.EnsembleAdamW(ensemble.parameters(), lr=[0.1, 0.2, 0.3, 0.4, 0.5])
        >>> ensemble = ek.ensembles.take_members(ensemble, [0, 3], optimizer)
        >>> ensemble.weight.shape, optimizer.param_groups[0]["lr"].tolist()
        (torch.Size([2, 3, 8]), [0.1, 0.4])
    """
    op = "take_members"
    if not isinstance(ensemble, StackedEnsemble):
        reject(op, "ensemble", "a StackedEnsemble", type(ensemble).__name__, TypeError)
    chosen = _indices(op, members, ensemble.num_members)
    if ensemble.shared:
        reject(op, "ensemble", "one whose members share nothing", f"one that shares {min(ensemble.shared)}")
    taken = stack([member_of(ensemble, e) for e in chosen], randomness=ensemble.randomness)
    for old, new in zip(ensemble.modules(), taken.modules()):
        new.training = old.training
    if optimizer is not None:
        _follow(optimizer, list(ensemble.parameters()), list(taken.parameters()), chosen, ensemble.num_members)
    return taken


def _indices(op: str, members: Tensor | Sequence[int] | Sequence[bool], count: int) -> list[int]:
    values = members.tolist() if isinstance(members, Tensor) else list(members)
    if values and all(isinstance(value, bool) for value in values):
        if len(values) != count:
            reject(op, "members", f"bool [E={count}] or indices", f"{len(values)} bools")
        values = [e for e, wanted in enumerate(values) if wanted]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        reject(op, "members", f"bool [E={count}] or indices", repr(members), TypeError)
    if not values:
        reject(op, "members", "at least one", "none")
    for value in values:
        if not -count <= value < count:
            reject(op, "members", f"in [-{count}, {count})", f"{value}")
    return [value % count for value in values]


def _follow(
    optimizer: torch.optim.Optimizer, old: list[Tensor], new: list[Tensor], chosen: list[int], count: int
) -> None:
    """Groups and states of the old parameters become those of the new."""
    by = {id(p): q for p, q in zip(old, new)}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in by:
                reject("take_members", "optimizer", "of this ensemble's parameters", "one with others")

    def reduced(value: object, per_member: bool) -> object:
        if isinstance(value, tuple):
            return tuple(reduced(part, per_member) for part in value)
        if isinstance(value, Tensor) and value.dim() and len(value) == count and per_member:
            return type(value).of(value[chosen]) if hasattr(type(value), "of") else value[chosen].clone()
        return value

    states = {}
    for group in optimizer.param_groups:
        own = group.get("members", True)
        group.update({name: reduced(value, own) for name, value in group.items() if name != "params"})
        for p in group["params"]:
            state = {name: reduced(value, own) for name, value in optimizer.state.get(p, {}).items()}
            if state:
                states[by[id(p)]] = state
        group["params"] = [by[id(p)] for p in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(states)
    if hasattr(optimizer, "num_members"):
        optimizer.num_members = len(chosen)


class EarlyStopping:
    """Stops each member of an ensemble when its own validation loss no longer falls, and keeps its best values.

    Args:
        ensemble: any module whose parameters and buffers are `[E, ...]`, as those of :func:`effens_kernels.stack`.
        num_members: E; of a :class:`StackedEnsemble` it is known.
        patience: how many calls of `step` in a row without a better loss a member is given.
        min_delta: by how much a loss has to fall in order to be better.

    `step(losses)` takes the members' losses `[E]` after each epoch: members whose loss is the best so far have their
    values copied, in one `where` per tensor.  `active` is bool `[E]`, for `optimizer.active` of `ek.optim`; NaN is no
    better loss.  `restore()` gives every member its best values back.

    Raises:
        ValueError: losses are not `[E]`; a tensor of the ensemble is not `[E, ...]`; patience or min_delta out of range

    Example:
        >>> import torch, effens_kernels as ek
        >>> ensemble = ek.stack([torch.nn.Linear(8, 3) for _ in range(3)])
        >>> stopping = ek.ensembles.EarlyStopping(ensemble, patience=1)
        >>> stopping.step(torch.tensor([1.0, 1.0, 1.0])).tolist()
        [True, True, True]
        >>> stopping.step(torch.tensor([0.9, 1.1, 0.8])).tolist()  # the second had its chance
        [True, False, True]
        >>> stopping.restore()
        >>> stopping.best.tolist() == [0.8999999761581421, 1.0, 0.800000011920929]
        True
    """

    def __init__(
        self, ensemble: nn.Module, num_members: int | None = None, *, patience: int = 10, min_delta: float = 0.0
    ) -> None:
        op = type(self).__name__
        num_members = getattr(ensemble, "num_members", None) if num_members is None else num_members
        if isinstance(num_members, bool) or not isinstance(num_members, int):
            reject(op, "num_members", "an int", repr(num_members), TypeError)
        if isinstance(patience, bool) or not isinstance(patience, int):
            reject(op, "patience", "an int", repr(patience), TypeError)
        if patience < 1:
            reject(op, "patience", "at least 1", repr(patience))
        if not min_delta >= 0:
            reject(op, "min_delta", "at least 0", repr(min_delta))
        self.ensemble, self.patience, self.min_delta = ensemble, patience, min_delta
        for name, tensor in self._tensors():
            if tensor.dim() == 0 or len(tensor) != num_members:
                reject(op, "ensemble", f"of tensors [E={num_members}, ...]", f"{name} {list(tensor.shape)}")
        self.best = torch.full((num_members,), inf, dtype=torch.float64)
        self.waited = torch.zeros(num_members, dtype=torch.long)
        self.values = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    @property
    def active(self) -> Tensor:
        """Bool `[E]`: the members that are still to be trained."""
        return self.waited < self.patience

    @torch.no_grad()
    def step(self, losses: Tensor | Sequence[float]) -> Tensor:
        """Take note of the members' losses `[E]`; returns `active`.  Members that have stopped stay so."""
        losses = torch.as_tensor(losses).detach().to("cpu", torch.float64)
        if losses.shape != self.best.shape:
            reject(type(self).__name__, "losses", f"[E={len(self.best)}]", losses)
        better = self.active & (losses < self.best - self.min_delta)
        self.waited += (self.active & ~better).long()
        self.waited[better] = 0
        self.best = torch.where(better, losses, self.best)
        for name, tensor in self._tensors():
            kept = self.values[name]
            kept.copy_(torch.where(_along(better, tensor), tensor, kept))
        return self.active

    @torch.no_grad()
    def restore(self) -> None:
        """Give all members the values that they had at their best losses."""
        for name, tensor in self._tensors():
            tensor.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best.clone(), "waited": self.waited.clone(), "values": copy.deepcopy(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of an ensemble of the same members.

        Raises:
            ValueError: of other members or tensors.
        """
        shapes = {name: list(tensor.shape) for name, tensor in self.values.items()}
        given = {name: list(tensor.shape) for name, tensor in state["values"].items()}
        if given != shapes or state["best"].shape != self.best.shape:
            reject(type(self).__name__, "state", "of this ensemble", "of another")
        self.best, self.waited = state["best"].clone(), state["waited"].clone()
        for name, tensor in state["values"].items():
            self.values[name].copy_(tensor)

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        yield from self.ensemble.named_parameters()
        yield from self.ensemble.named_buffers()


def _along(members: Tensor, t: Tensor) -> Tensor:
    return members.to(t.device).view(-1, *(1 for _ in t.shape[1:]))
