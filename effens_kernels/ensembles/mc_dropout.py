"""MC dropout: one model whose dropout stays on, run several times at once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from ..ops._checks import reject
from ._ensemble import Ensemble
from ._members import Fused, explained
from ._summary import Summary
from ._surgery import Sites

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class MCDropoutEnsemble(Ensemble):
    r"""A model with dropout as an ensemble whose members are what is left of it.

    .. math:: y_e = f(x;\, \theta, m_e), \qquad m_e \sim \text{Bernoulli}, \qquad e = 1 \dots E

    MC dropout (Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep
    Learning"), made by `effens_kernels.convert(model, "mc_dropout", num_members)`: E passes through one model, with
    masks that each call draws anew for each member and row.  They run as one (`torch.func.vmap`), and what comes
    before the first dropout, or does not depend on any, runs once for all members.

    Dropout layers are on in `eval()` as well as in `train()`; all else follows the mode, so predict in `eval()`.  To
    train, run `ensemble.model`, which is the plain model, or convert one that is trained.  Dropout that is no module,
    as `F.dropout` and that within `nn.MultiheadAttention` and `nn.LSTM`, follows the mode.  `include` and `exclude` say
    which dropout layers are kept on.

    `forward(*inputs, per_member=False)` takes inputs `[B, ...]`, or with `per_member=True` `[E, B, ...]`, and gives
    `[E, B, ...]`.  `member(e)` is the model with its dropout on, whatever the member.

    Raises:
        RuntimeError: forward code that cannot run for all members at once, see :class:`StackedEnsemble`; named is the
            module, and why.

    Attributes:
        model: the plain model, a copy of what was converted.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "mc_dropout", num_members=30).eval()
        >>> probabilities = ensemble(torch.randn(32, 8)).softmax(-1)
        >>> probabilities.shape
        torch.Size([30, 32, 4])
        >>> bool((probabilities.std(0) > 0).all())
        True
    """

    def __init__(self, model: nn.Module, num_members: int, active: list[str]) -> None:
        super().__init__(model, num_members)
        self.active = active  # paths of the dropout layers that are kept on
        for path in active:
            model.get_submodule(path).inplace = False  # it would write into what comes before, which members share
        self.train(model.training)

    def train(self, mode: bool = True) -> MCDropoutEnsemble:
        super().train(mode)
        for path in self.active:
            self.model.get_submodule(path).train()
        return self

    def forward(self, *inputs: object, per_member: bool = False, **named: object) -> object:
        leaves, spec = pytree.tree_flatten((inputs, named))
        dims = [0 if per_member and isinstance(t, Tensor) and t.dim() else None for t in leaves]
        for t, dim in zip(leaves, dims):
            if dim is not None and t.shape[0] != self.num_members:
                reject(type(self).__name__, "input", f"[E={self.num_members}, B, ...] with per_member=True", t)
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        mode = Fused(self.num_members, training)
        found: list[object] = []  # what is not mapped: the result without its tensors

        def run(_: Tensor, *leaves: object) -> list[Tensor]:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            with mode:
                y = self.model(*args, **kwargs)
            values, arrangement = pytree.tree_flatten(y)
            found.extend((values, arrangement))
            return [v for v in values if isinstance(v, Tensor)]

        members = torch.empty(self.num_members, 0)  # vmap asks for something that differs
        try:
            results = iter(vmap(run, (0, *dims), randomness="different")(members, *leaves))
        except RuntimeError as error:
            raise explained(error, self.model, "mc_dropout") from error
        values, arrangement = found
        return pytree.tree_unflatten([next(results) if isinstance(v, Tensor) else v for v in values], arrangement)

    def member(self, member: int) -> nn.Module:
        super().member(member)  # checks it
        return copy.deepcopy(self.model)

    def summary(self) -> Summary:
        """Parameters, all of which members share."""
        count = sum(p.numel() for p in self.parameters())
        return Summary(
            f"MC dropout of {self.num_members} members",
            ("part", "shared", "per member"),
            (("the model", count, 0),),
            ("all", count, 0),
            (f"dropout is kept on in {', '.join(self.active)}",),
        )


def convert(sites: Sites, num_members: int) -> MCDropoutEnsemble:
    """The method "mc_dropout"."""
    active = [site.paths[0] for site in sites.meant if isinstance(site.module, DROPOUTS)]
    if not active:
        reject("convert", "model", "with dropout layers to keep on", "one without")
    return MCDropoutEnsemble(copy.deepcopy(sites.model), num_members, active)
