"""SWAG: a Gaussian over all parameters, fitted to the iterates of SGD; its samples are the members of an ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._layout import positive
from ..ops._checks import DTYPES, reject
from ..ops.mix_templates.noise import mix_with_noise_
from ._alike import check_models
from ._surgery import unwrapped
from .stack import StackedEnsemble, assembled, copied, empty_rows


class SWAG:
    r"""A Gaussian fitted to a model's parameters as training goes on; sampled, it is an ensemble.

    SWA-Gaussian (Maddox et al. 2019, "A Simple Baseline for Bayesian Uncertainty in Deep Learning", algorithm 1).
    After n collected models, with their mean, their variance element by element, and the deviations D of the last K of
    them from the mean as it was then, all parameters of member e together are (equation 1)

    .. math:: \theta_e = \bar\theta + s \Big( \sqrt{\tfrac{1}{2} \sigma^2_{\text{diag}}} \circ z_{1e}
        + \frac{D \, z_{2e}}{\sqrt{2 (K - 1)}} \Big), \qquad z_{1e}, z_{2e} \sim \mathcal{N}(0, I)

    with one z2 [K] for all tensors of a member, without which they would not be correlated.  K counts the columns that
    are there: `rank` at most, fewer while fewer models have been collected.  From a single one, samples are its copies
    (but for `min_variance`).

    Build it from the model, call `collect` now and then in training (the paper: at the end of each epoch, with a high
    constant learning rate, when training is otherwise done), and `sample` members to predict with.  Running statistics
    of BatchNorm are the last collected model's, and fit no sample: :func:`update_batchnorm` computes each member's own.

    Args:
        model: any module that :func:`effens_kernels.stack` takes, of which nothing is changed; or one wrapped in
            DistributedDataParallel, DataParallel or torch.compile.
        rank: the most columns of D, at least 2; or 0 for the diagonal alone, which then has the whole variance, not
            half (the paper's SWAG-Diagonal).
        min_variance: variances are at least this.
        device: where statistics, `rank + 2` times the trained parameters, and samples are; None: where the parameters
            are.

    Statistics are float32, or float64 where parameters are; the variance is that of the population, updated without
    cancellation.  Parameters without `requires_grad` are the last collected ones in all members, and have no
    statistics.  Tied parameters are one.

    Attributes:
        num_collected: n.

    Raises:
        TypeError: no module; a parameter to be trained that is not of a floating dtype (float32, float16, bfloat16,
            float64).
        ValueError: a model that cannot be stacked, or without parameters to be trained; `rank` 1 or negative;
            `min_variance` negative.

    Example:
        >>> import torch, effens_kernels as ek
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> swag = ek.ensembles.SWAG(model, rank=5)
        >>> for epoch in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     swag.collect(model)
        >>> ensemble = swag.sample(num_members=20)
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([20, 32, 4])
        >>> mean = ek.unstack(swag.sample(1, scale=0.0))[0]  # stochastic weight averaging's solution
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        rank: int = 20,
        *,
        min_variance: float = 1e-30,
        device: torch.device | str | None = None,
    ) -> None:
        model = unwrapped(model)
        if not isinstance(model, nn.Module):
            reject("SWAG", "model", "a torch.nn.Module", type(model).__name__, TypeError)
        if isinstance(rank, bool) or not isinstance(rank, int):
            reject("SWAG", "rank", "an int", repr(rank), TypeError)
        if rank < 0 or rank == 1:
            reject("SWAG", "rank", "0 (diagonal alone) or at least 2", repr(rank))
        if not (isinstance(min_variance, (int, float)) and 0 <= min_variance and isfinite(min_variance)):
            reject("SWAG", "min_variance", "a number of at least 0", repr(min_variance))
        check_models([model])
        for name, p in model.named_parameters():
            if p.requires_grad and p.dtype not in DTYPES:
                expected = "float32, float16, bfloat16 or float64, or without requires_grad"
                reject("SWAG", f"parameter {name!r}", expected, p, TypeError)
        if not any(p.requires_grad for p in model.parameters()):
            reject("SWAG", "model", "with parameters that require gradients", "one without")

        self.rank, self.min_variance, self.num_collected = rank, float(min_variance), 0
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        # What each tensor is and, of those that are not sampled, the last value.
        self._plain = copied(
            model,
            lambda t: torch.empty_like(t, device="meta") if id(t) in trained else t.detach().to(device, copy=True),
        ).eval()
        self._templates: dict[str, Tensor] = {}  # [1 + rank, *shape]: the mean, then the deviations in turn
        self._variance: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                options = {"dtype": torch.promote_types(p.dtype, torch.float32), "device": device or p.device}
                self._templates[name] = empty_rows(p.detach(), 1 + rank, **options).zero_()
                self._variance[name] = empty_rows(p.detach(), 1, **options)[0].zero_()

    @torch.no_grad()
    def collect(self, model: nn.Module) -> None:
        """Take in the model's parameters, and its buffers in place of those collected before.

        Args:
            model: that which this was built from, or one of the same parameters and buffers.

        Raises:
            TypeError: no module.
            ValueError: a parameter or buffer that is missing, or differs in shape, dtype or `requires_grad`.
        """
        tensors = self._matching(unwrapped(model))
        n = self.num_collected + 1
        for name, templates in self._templates.items():
            mean, variance = templates[0], self._variance[name]
            # From the mean before, made where the deviation from the mean after is to be.
            deviation = templates[1 + (n - 1) % self.rank] if self.rank else torch.empty_like(mean)
            deviation.copy_(tensors[name]).sub_(mean)
            mean.add_(deviation, alpha=1 / n)
            variance.mul_(1 - 1 / n).addcmul_(deviation, deviation, value=(n - 1) / n**2)
            deviation.mul_(1 - 1 / n)
        for name, value in self._kept():
            value.copy_(tensors[name])
        self.num_collected = n

    @torch.no_grad()
    def sample(self, num_members: int, scale: float = 1.0, generator: torch.Generator | None = None) -> StackedEnsemble:
        """Draw the parameters of all members, each tensor's in one pass, straight into an ensemble.

        Args:
            num_members: E.
            scale: s, how far members are from the mean; with 0 all are the mean exactly (rounded to the parameters'
                dtype).
            generator: of the random numbers, on the device of the statistics; None: PyTorch's own.

        Returns:
            A :class:`StackedEnsemble` in eval mode, with buffers of the model that was collected last.

        Raises:
            TypeError: `num_members` is no int, or `scale` no number.
            ValueError: nothing has been collected; no members; `scale` negative or not finite; a generator of another
                device.
        """
        positive("SWAG.sample", num_members=num_members)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            reject("SWAG.sample", "scale", "a number", repr(scale), TypeError)
        if not (isfinite(scale) and scale >= 0):
            reject("SWAG.sample", "scale", "at least 0, and finite", repr(scale))
        if self.num_collected == 0:
            reject("SWAG", "sample", "called after collect", "nothing collected")
        device = next(iter(self._templates.values())).device
        if generator is not None and generator.device != device:
            reject("SWAG.sample", "generator", f"on {device} like the statistics", f"one on {generator.device}")

        columns = min(self.num_collected, self.rank)
        columns = columns if columns > 1 else 0
        by = scale / sqrt(2 * (columns - 1)) if columns else 0.0
        z2 = torch.randn(num_members, columns, generator=generator, device=device, dtype=torch.float32)
        part = 0.5 if self.rank else 1.0  # of the variance that is diagonal
        stacked: dict[int, Tensor] = {}
        for name, templates in self._templates.items():
            like = self._plain.get_parameter(name)
            sigma = self._variance[name].clamp(min=self.min_variance).mul_(part).sqrt_().mul_(scale)
            values = empty_rows(templates[0], num_members, dtype=like.dtype)
            noise = values if values.dtype == templates.dtype else empty_rows(templates[0], num_members)
            coefficients = F.pad(z2.to(templates.device, templates.dtype) * by, (1, 0), value=1.0)  # of the mean, 1
            # The generator is of one device, and is not asked elsewhere.
            _rows(noise).normal_(generator=generator if templates.device == device else None)
            mix_with_noise_(_rows(noise), _rows(sigma.unsqueeze(0))[0], coefficients, _rows(templates[: 1 + columns]))
            if noise is not values:
                values.copy_(noise)
            stacked[id(like)] = nn.Parameter(values)
        return assembled([self._plain] * num_members, stacked=stacked)

    def state_dict(self) -> dict[str, object]:
        """All that has been collected, to go on from: tensors by name and a number, which refer to what is here."""
        return {
            "num_collected": self.num_collected,
            "templates": dict(self._templates),
            "variance": dict(self._variance),
            "kept": dict(self._kept()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a state of a SWAG of the same model and rank, which is copied.

        Raises:
            ValueError: a tensor that is missing, not known here, or of another shape.
        """
        own = self.state_dict()
        pairs = [(kind, name, t) for kind in ("templates", "variance", "kept") for name, t in own[kind].items()]
        for kind in ("templates", "variance", "kept"):
            if set(state.get(kind, {})) != set(own[kind]):
                apart = sorted(set(state.get(kind, {})) ^ set(own[kind]))
                reject("SWAG.load_state_dict", kind, "of the same tensors as here", f"others: {apart}")
        for kind, name, t in pairs:
            if state[kind][name].shape != t.shape:
                reject("SWAG.load_state_dict", f"{kind}[{name!r}]", f"{list(t.shape)}", state[kind][name])
        for kind, name, t in pairs:
            t.copy_(state[kind][name])
        self.num_collected = int(state["num_collected"])

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers, and parameters that are not trained."""
        for name, p in self._plain.named_parameters():
            if name not in self._templates:
                yield name, p.data
        yield from self._plain.named_buffers()

    def _matching(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors by name, which are as they were when this was built."""
        if not isinstance(model, nn.Module):
            reject("SWAG.collect", "model", "a torch.nn.Module", type(model).__name__, TypeError)
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        known = {**dict(self._plain.named_parameters()), **dict(self._plain.named_buffers())}
        for name in [*known, *(name for name in found if name not in known)]:
            told, expected = (_told(tensors.get(name)) for tensors in (found, known))
            if told != expected:
                reject("SWAG.collect", name, f"{expected}, as when this was built", told)
        return found

    def __repr__(self) -> str:
        return f"SWAG(rank={self.rank}, num_collected={self.num_collected})"


def _rows(t: Tensor) -> Tensor:
    """[n, *shape], each row dense, as [n, N] in the order of memory."""
    size = t[0].numel()
    return t.as_strided((t.shape[0], size), (size, 1))


def _told(t: Tensor | None) -> str:
    if t is None:
        return "no such tensor"
    frozen = "" if t.requires_grad or not isinstance(t, nn.Parameter) else " without requires_grad"
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}{frozen}"
