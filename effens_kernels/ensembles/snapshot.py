"""Snapshot ensembles: one training in cycles of the learning rate, whose ends are the members."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from ..nn._layout import positive
from ..ops._checks import reject
from ._alike import check_models
from ._surgery import unwrapped
from .stack import StackedEnsemble, copied, stack


class SnapshotEnsemble:
    r"""Members that one model is, in turn, at the ends of M cycles of its training.

    Snapshot ensembles (Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free").  The learning rate of step t
    of T falls from the optimizer's own, and is that again when a cycle is over (equation 2):

    .. math:: \alpha(t) = \frac{\alpha_0}{2} \Big( \cos \frac{\pi \, \operatorname{mod}(t - 1, \lceil T/M \rceil)}
        {\lceil T/M \rceil} + 1 \Big), \qquad t = 1 \dots T

    Build it from the model and its optimizer, call `step()` after each of the optimizer's, which sets the next learning
    rate and copies the model where a cycle ends, and predict with `ensemble()`.  The last cycle ends with step T: where
    M does not divide T it is shorter than the others, and there may be fewer than M.

    Args:
        model: any module that :func:`effens_kernels.stack` takes; or one wrapped in DistributedDataParallel,
            DataParallel or torch.compile.
        optimizer: of the model, with the learning rate to begin cycles with, in each of its groups.
        num_steps: T, the optimizer's steps in all.
        num_cycles: M.
        device: where snapshots are kept and the ensemble is; None: where the model is.

    Attributes:
        scheduler: the schedule, torch's CosineAnnealingWarmRestarts.
        snapshots: the models so far, oldest first.

    Raises:
        TypeError: no module, no optimizer, or numbers that are not ints.
        ValueError: a model that cannot be stacked; numbers below 1; more cycles than steps.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        >>> snapshots = ek.ensembles.SnapshotEnsemble(model, optimizer, num_steps=60, num_cycles=6)
        >>> for step in range(60):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     snapshots.step()
        >>> ensemble = snapshots.ensemble(last=4)
        >>> ensemble(torch.randn(32, 8)).softmax(-1).mean(0).shape
        torch.Size([32, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        num_cycles: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = unwrapped(model)
        if not isinstance(self.model, nn.Module):
            reject("SnapshotEnsemble", "model", "a torch.nn.Module", type(model).__name__, TypeError)
        if not isinstance(optimizer, torch.optim.Optimizer):
            reject("SnapshotEnsemble", "optimizer", "a torch.optim.Optimizer", type(optimizer).__name__, TypeError)
        positive("SnapshotEnsemble", num_steps=num_steps, num_cycles=num_cycles)
        if num_cycles > num_steps:
            reject("SnapshotEnsemble", "num_cycles", f"at most num_steps={num_steps}", repr(num_cycles))
        check_models([self.model])
        self.optimizer, self.device = optimizer, device
        self.num_steps, self.num_cycles, self.num_done = num_steps, num_cycles, 0
        self.scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=-(-num_steps // num_cycles))
        self.snapshots: list[nn.Module] = []

    def step(self) -> None:
        """After a step of the optimizer: set the learning rate of the next, and copy the model where a cycle ends.

        Raises:
            ValueError: all steps are done.
        """
        if self.num_done == self.num_steps:
            reject("SnapshotEnsemble.step", "step", f"called num_steps={self.num_steps} times", "one call more")
        self.num_done += 1
        if self.num_done % self.scheduler.T_0 == 0 or self.num_done == self.num_steps:
            self.snapshots.append(self._copy())
        self.scheduler.step()

    def ensemble(self, last: int | None = None) -> StackedEnsemble:
        """The last snapshots, or all, as one module in eval mode; the paper's predictions are the mean of its softmax.

        Args:
            last: how many; the paper's m.

        Raises:
            TypeError: `last` is no int.
            ValueError: fewer snapshots than that, or none.
        """
        last = len(self.snapshots) if last is None else last
        positive("SnapshotEnsemble.ensemble", last=last)
        if last > len(self.snapshots):
            reject("SnapshotEnsemble.ensemble", "last", f"at most {len(self.snapshots)}, as there are", repr(last))
        return stack(self.snapshots[-last:])

    def state_dict(self) -> dict[str, object]:
        """All that is needed to go on, beside the states of the model and its optimizer."""
        return {
            "num_done": self.num_done,
            "scheduler": self.scheduler.state_dict(),
            "snapshots": [snapshot.state_dict() for snapshot in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state, in the midst of a cycle too, as a run that was not interrupted.

        Load the states of the model and the optimizer as well, before or after.

        Raises:
            ValueError: a state of another schedule.
        """
        length, here = state["scheduler"]["T_0"], self.scheduler.T_0
        if length != here:
            reject("SnapshotEnsemble.load_state_dict", "state", f"of cycles of {here} steps", f"one of {length}")
        snapshots = [self._copy() for _ in state["snapshots"]]
        for snapshot, values in zip(snapshots, state["snapshots"]):
            snapshot.load_state_dict(values)
        self.snapshots, self.num_done = snapshots, int(state["num_done"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @torch.no_grad()
    def _copy(self) -> nn.Module:
        return copied(self.model, lambda t: t.detach().to(self.device, copy=True)).eval()

    def __repr__(self) -> str:
        return f"SnapshotEnsemble(step {self.num_done} of {self.num_steps}, {len(self.snapshots)} snapshots)"
