"""Which members of a hyperparameter ensemble to keep: greedy selection by validation loss, and stopping early."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import inf, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import check_tensor, reject
from ..optim._optimizer import EnsembleOptimizer
from ..optim._per_member import PerMember
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
        loss = loss.masked_fill(loss.isnan() | ~allowed, inf)
        best = int(loss.argmin())
        if members and not loss[best] + 1e-12 * (1 + loss[best].abs()) < found[-1]:  # by more than rounding
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
        optimizer: one that trains the ensemble's parameters, each element by itself as SGD and AdamW do: its states and
            its hyperparameters of each member are reduced to these members, in place, and it goes on with the new
            ensemble's parameters.  Schedulers and :class:`EarlyStopping` are to be made anew.

    Raises:
        TypeError: not a :class:`StackedEnsemble`, indices of another type, no optimizer.
        ValueError: no members; an index out of range; an ensemble whose members share parameters; an optimizer that
            trains something else, or has states that are not of single members (LBFGS).

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
    if optimizer is not None:
        _check_optimizer(op, optimizer, ensemble)
    taken = stack([member_of(ensemble, e) for e in chosen], randomness=ensemble.randomness)
    if optimizer is not None:
        _follow(optimizer, list(ensemble.parameters()), list(taken.parameters()), chosen, ensemble.num_members)
    return taken


def _indices(op: str, members: Tensor | Sequence[int] | Sequence[bool], count: int) -> list[int]:
    if not isinstance(members, (Tensor, Sequence)) or (isinstance(members, Tensor) and members.dim() != 1):
        reject(op, "members", f"bool [E={count}] or indices", members, TypeError)
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


def _check_optimizer(op: str, optimizer: torch.optim.Optimizer, ensemble: StackedEnsemble) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        reject(op, "optimizer", "None or a torch.optim.Optimizer", type(optimizer).__name__, TypeError)
    own = {id(p) for p in ensemble.parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in own:
                reject(op, "optimizer", "of this ensemble's parameters", "one with others")
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and (value.dim() == 0 or len(value) == ensemble.num_members):
                    continue
                if isinstance(value, (Tensor, list, dict)):
                    reject(op, f"optimizer's state {name!r}", f"[E={ensemble.num_members}, ...]", type(value).__name__)


def _follow(
    optimizer: torch.optim.Optimizer, old: list[Tensor], new: list[Tensor], chosen: list[int], count: int
) -> None:
    """Groups and states of the old parameters become those of the new."""
    pairs = getattr(optimizer, "PAIRS", ())

    def reduced(name: str, value: object) -> object:
        if name in pairs and isinstance(value, (tuple, list)):
            return tuple(reduced("", part) for part in value)
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return type(value).of(value[chosen]) if isinstance(value, PerMember) else value[chosen].clone()
        if isinstance(value, list) and len(value) == count and name != "param_names":
            return [value[e] for e in chosen]
        return value

    by = {id(p): q for p, q in zip(old, new)}
    states = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                states[by[id(p)]] = {name: reduced(name, value) for name, value in optimizer.state[p].items()}
        group.update({name: reduced(name, value) for name, value in group.items() if name != "params"})
        group["params"] = [by[id(p)] for p in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(states)
    if isinstance(optimizer, EnsembleOptimizer):
        optimizer.num_members = len(chosen)
        optimizer.defaults.update({name: reduced(name, value) for name, value in optimizer.defaults.items()})


class EarlyStopping:
    """Stops each member of an ensemble when its own validation loss no longer falls, and keeps its best values.

    Args:
        ensemble: any module whose parameters and buffers are `[E, ...]`, as those of :func:`effens_kernels.stack`.
        num_members: E; of a :class:`StackedEnsemble` it is known.
        patience: how many calls of `step` in a row without a better loss a member is given.
        min_delta: by how much a loss has to fall in order to be better.

    `step(losses)` takes the members' losses `[E]` after each epoch: members whose loss is the best so far have their
    values copied.  `active` is bool `[E]`, for `optimizer.active` of `ek.optim`; NaN is no better loss.  `restore()`
    gives every member its best values back, and those that never had a loss the values that they began with.

    Raises:
        TypeError: no module; numbers of other types.
        ValueError: losses are not `[E]`; a tensor of the ensemble is not `[E, ...]`; patience < 1; min_delta < 0

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
        if not isinstance(ensemble, nn.Module):
            reject(op, "ensemble", "a torch.nn.Module", type(ensemble).__name__, TypeError)
        num_members = getattr(ensemble, "num_members", None) if num_members is None else num_members
        if isinstance(num_members, bool) or not isinstance(num_members, int):
            reject(op, "num_members", "an int", repr(num_members), TypeError)
        if isinstance(patience, bool) or not isinstance(patience, int):
            reject(op, "patience", "an int", repr(patience), TypeError)
        if patience < 1:
            reject(op, "patience", "at least 1", repr(patience))
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)):
            reject(op, "min_delta", "a number", repr(min_delta), TypeError)
        if not min_delta >= 0:
            reject(op, "min_delta", "at least 0", repr(min_delta))
        self.ensemble, self.patience, self.min_delta = ensemble, patience, min_delta
        if getattr(ensemble, "shared", None):
            reject(op, "ensemble", "one whose members share nothing", f"one that shares {min(ensemble.shared)}")
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
        losses = torch.as_tensor(losses, dtype=torch.float64, device="cpu").detach()
        if losses.shape != self.best.shape:
            reject(type(self).__name__, "losses", f"[E={len(self.best)}]", losses)
        better = self.active & (losses < self.best - self.min_delta)
        self.waited += (self.active & ~better).long()
        self.waited[better] = 0
        self.best = torch.where(better, losses, self.best)
        for name, tensor in self._tensors():
            kept = self.values[name]  # where the ensemble was when this was made
            kept[better.to(kept.device)] = tensor[better.to(tensor.device)].to(kept)
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
        self.best, self.waited = (state[name].to("cpu", copy=True) for name in ("best", "waited"))
        for name, tensor in state["values"].items():
            self.values[name].copy_(tensor)

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        yield from self.ensemble.named_parameters()
        yield from self.ensemble.named_buffers()
