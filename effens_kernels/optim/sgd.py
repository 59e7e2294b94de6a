"""EnsembleSGD: stochastic gradient descent with hyperparameters of each member."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops._checks import reject
from ..ops.optimizer_step import coefficients, sgd_step_
from ._optimizer import EnsembleOptimizer
from ._per_member import ANY, LEAST_ZERO, PerMember, Range, plain

Value = float | Tensor | list[float]


class EnsembleSGD(EnsembleOptimizer):
    r"""`torch.optim.SGD` for an ensemble: each member by its own learning rate, momentum and weight decay.

    .. math::
        d_e &= g_e + \lambda_e \theta_e \\
        b_e &= \mu_e b_e + (1 - \tau_e) d_e \qquad \text{(at first } d_e \text{)} \\
        \theta_e &\leftarrow \theta_e - \gamma_e b_e
        \qquad \text{(Nesterov: } \theta_e - \gamma_e (d_e + \mu_e b_e) \text{; without momentum: } \theta_e -
        \gamma_e d_e \text{)}

    for every member e: to rounding, what E optimizers of PyTorch do to E models, in one pass over each parameter.  So
    are trained the members of hyper-deep and hyper-batch ensembles (Wenzel et al. 2020, "Hyperparameter Ensembles for
    Robustness and Uncertainty Quantification", sections 3 and 4).

    Args:
        params: parameters `[E, ...]`, the axis of members in front, or groups of them: those of `ek.stack`, of the
            layers of `ek.nn`.  What members share, such as `weight` of BatchEnsemble, goes in a group with
            `members=False`, whose hyperparameters are numbers.
        lr, momentum, dampening, weight_decay: a number, or one for each member: a tensor `[E]` or a list.
        nesterov: Nesterov's momentum; all members have momentum then, and no dampening.
        maximize: go up instead of down.
        active: None, or bool `[E]`: only these members are updated.  It may be set at any time, as an attribute; see
            there.
        backend: None (automatic), "reference", "cpu" or "triton"; a named backend never falls back.

    Hyperparameters `[E]` are float64 tensors on the CPU in `param_groups`, where they may be replaced at any time, and
    which PyTorch's schedulers compute with: all but ReduceLROnPlateau, which wants a single number.  Parameters of
    float32, float16, bfloat16 and float64 have states of their own dtype and order in memory, and may have any strides;
    those whose members have gaps are copied twice a step.  States have PyTorch's names, and `step` `[E]` besides, the
    number of steps that a momentum buffer has had.  A step on a GPU takes numbers from the CPU, so that CUDA graphs
    cannot capture it.

    Raises:
        TypeError: a hyperparameter that is no number, an unsupported dtype, a sparse gradient.
        ValueError: a hyperparameter out of range, or not of E members; a parameter that is not `[E, ...]`; unknown
            backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ensemble = ek.stack([torch.nn.Linear(8, 4) for _ in range(3)])
        >>> optimizer = ek.optim.EnsembleSGD(ensemble.parameters(), lr=[0.1, 0.03, 0.01], momentum=0.9)
        >>> ensemble(torch.randn(32, 8)).square().mean((1, 2)).sum().backward()  # a sum: members do not mix
        >>> optimizer.active = [True, True, False]
        >>> before = ensemble.weight.detach().clone()
        >>> optimizer.step()
        >>> (ensemble.weight != before).flatten(1).any(1)
        tensor([ True,  True, False])
    """

    RANGES: ClassVar[dict[str, Range]] = {
        "lr": LEAST_ZERO,
        "momentum": LEAST_ZERO,
        "dampening": ANY,
        "weight_decay": LEAST_ZERO,
    }

    def __init__(
        self,
        params: Iterable,
        lr: Value = 1e-3,
        momentum: Value = 0.0,
        dampening: Value = 0.0,
        weight_decay: Value = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        active: Tensor | list[bool] | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, active, backend)

    def _check_group(self, group: dict[str, Any]) -> None:
        if not isinstance(group["nesterov"], bool):
            reject(self._name, "nesterov", "a bool", group["nesterov"], TypeError)
        if group["nesterov"] and (not _all(group["momentum"]) or _any(group["dampening"])):
            got = f"momentum {_shown(group['momentum'])}, dampening {_shown(group['dampening'])}"
            reject(self._name, "nesterov", "with momentum above 0 and dampening 0, of all members", got)

    def _step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, momentum, dampening, weight_decay = (plain(group[name]) for name in self.RANGES)
        active, buffers = self._active(group), []
        if _any(momentum):
            steps, buffers = self._states(params, ["momentum_buffer"], group["members"])
            had = torch.stack(steps)
        else:
            had = torch.zeros(len(params), self.num_members if group["members"] else 1, dtype=torch.float64)
        table = coefficients.sgd(
            had,
            active,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            maximize=group["maximize"],
        )
        sgd_step_(params, grads, buffers, table, group["nesterov"], self.backend)
        if buffers:
            self._count(steps, active * torch.as_tensor(momentum != 0))


def _any(value: float | Tensor) -> bool:
    return bool(value.any()) if isinstance(value, Tensor) else value != 0


def _all(value: float | Tensor) -> bool:
    return bool(value.all()) if isinstance(value, Tensor) else value != 0


def _shown(value: float | PerMember) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)
