"""EnsembleAdamW: Adam with decoupled weight decay and hyperparameters of each member."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops._checks import reject
from ..ops.optimizer_step import adamw_step_, coefficients
from ._optimizer import EnsembleOptimizer
from ._per_member import BELOW_ONE, LEAST_ZERO, Range, plain

Value = float | Tensor | list[float]


class EnsembleAdamW(EnsembleOptimizer):
    r"""`torch.optim.AdamW` for an ensemble: each member by its own learning rate, weight decay and betas.

    .. math::
        m_e &= \beta_{1e} m_e + (1 - \beta_{1e}) g_e \qquad v_e = \beta_{2e} v_e + (1 - \beta_{2e}) g_e^2 \\
        \theta_e &\leftarrow (1 - \gamma_e \lambda_e) \theta_e - \frac{\gamma_e}{1 - \beta_{1e}^{t_e}} \,
        \frac{m_e}{\sqrt{v_e} / \sqrt{1 - \beta_{2e}^{t_e}} + \epsilon_e}

    for every member e, in its step :math:`t_e` (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization",
    algorithm 2, with weight decay in proportion to the learning rate, as PyTorch has it): to rounding, what E
    optimizers of PyTorch do to E models, in one pass over each parameter.  So are trained the members of hyperparameter
    ensembles (Wenzel et al. 2020, "Hyperparameter Ensembles for Robustness and Uncertainty Quantification", sections 3
    and 4).

    Args:
        params: parameters `[E, ...]`, the axis of members in front, or groups of them: those of `ek.stack`, of the
            layers of `ek.nn`.  What members share, such as `weight` of BatchEnsemble, goes in a group with
            `members=False`, whose hyperparameters are numbers.
        lr, eps, weight_decay: a number, or one for each member: a tensor `[E]` or a list.
        betas: a pair of such.
        amsgrad: the largest of all :math:`v_e` so far takes its place in the update.
        maximize: go up instead of down.
        active: None, or bool `[E]`: only these members are updated.  It may be set at any time, as an attribute; see
            there.
        backend: None (automatic), "reference", "cpu" or "triton"; a named backend never falls back.

    Hyperparameters `[E]` are float64 tensors on the CPU in `param_groups`, where they may be replaced at any time, and
    which PyTorch's schedulers compute with: all but ReduceLROnPlateau, which wants a single number.  Parameters of
    float32, float16, bfloat16 and float64 have states of their own dtype and order in memory, and may have any strides;
    those whose members have gaps are copied twice a step.  States have PyTorch's names; `step` is `[E]`.  A step on a
    GPU takes numbers from the CPU, so that CUDA graphs cannot capture it.

    Raises:
        TypeError: a hyperparameter that is no number, an unsupported dtype, a sparse gradient.
        ValueError: a hyperparameter out of range, or not of E members; a parameter that is not `[E, ...]`; unknown
            backend; a backend that cannot run.

    Example:
        >>> import torch, effens_kernels as ek
        >>> ensemble = ek.stack([torch.nn.Linear(8, 4) for _ in range(3)])
        >>> rates, betas = [1e-2, 1e-3, 1e-4], ([0.9, 0.9, 0.8], 0.99)
        >>> optimizer = ek.optim.EnsembleAdamW(ensemble.parameters(), lr=rates, betas=betas)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> ensemble(torch.randn(32, 8)).square().mean((1, 2)).sum().backward()  # a sum: members do not mix
        >>> optimizer.step()
        >>> schedule.step()
        >>> optimizer.param_groups[0]["lr"].tolist()
        [0.005, 0.0005, 5e-05]
    """

    RANGES: ClassVar[dict[str, Range]] = {
        "lr": LEAST_ZERO,
        "betas": BELOW_ONE,
        "eps": LEAST_ZERO,
        "weight_decay": LEAST_ZERO,
    }
    PAIRS = ("betas",)

    def __init__(
        self,
        params: Iterable,
        lr: Value = 1e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        active: Tensor | list[bool] | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, active, backend)

    def _check_group(self, group: dict[str, Any]) -> None:
        if not isinstance(group["amsgrad"], bool):
            reject(self._name, "amsgrad", "a bool", group["amsgrad"], TypeError)

    def _step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        steps, *states = self._states(params, names, group["members"])
        active = self._active(group)
        lr, betas, eps, weight_decay = (plain(group[name]) for name in self.RANGES)
        table = coefficients.adamw(
            torch.stack(steps) + active,
            active,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=group["maximize"],
        )
        adamw_step_(params, grads, *states[:2], states[2] if group["amsgrad"] else [], table, self.backend)
        self._count(steps, active)
