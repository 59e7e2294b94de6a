"""MixtureEnsembles of whole models: layers of one type and shape, in all members, share templates."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from ..nn import EnsembleBatchNorm1d, EnsembleBatchNorm2d, MixtureConv2d, MixtureLinear, TemplateBank
from ..nn._layout import positive
from ..nn._mixture import Mixture, rms
from ..nn.bank import usual_std
from ..nn.norm import _EnsembleBatchNorm
from ..ops._checks import reject
from . import _budget
from ._budget import Rule, Size
from ._ensemble import Ensemble
from ._summary import Summary
from ._surgery import Sites, replaced

LAYERS = (nn.Linear, nn.Conv2d)
NORMS = {nn.BatchNorm1d: EnsembleBatchNorm1d, nn.BatchNorm2d: EnsembleBatchNorm2d}
ASSIGNMENTS = ("shared", "disjoint")


class Group(NamedTuple):
    """Layers of one type and shape of weight: a parameter group of the paper."""

    name: str
    shape: tuple[int, ...]
    layers: list[nn.Module]

    @property
    def size(self) -> Size:
        biases = sum(layer.bias.numel() for layer in self.layers if layer.bias is not None)
        return Size(prod(self.shape), len(self.layers), biases)


class Share(NamedTuple):
    """A row of the summary: what became of a group."""

    group: str
    layers: int | None
    templates: int | None
    per_layer: int | None
    shared: int  # parameters that members have together
    per_member: int  # parameters that each has


class MixtureEnsemble(Ensemble):
    """A model whose layers combine templates of common banks, for each member with coefficients of its own.

    MixtureEnsembles (Teterwak et al. 2021, "MixtureEnsembles: Leveraging Parameter Sharing for Efficient Ensembles"),
    made by `effens_kernels.convert(model, "mixture", num_members, ...)`.  Linear and Conv2d layers of one type and
    weight shape are a group with a bank of templates, which its layers take in turn; BatchNorm layers and biases are
    each member's own.  Templates and coefficients are drawn at random, with the sizes of the plain model's weights;
    layers that members share, biases and BatchNorm begin as the model's.

    Options of `convert`:
        budget: how many parameters the ensemble may have in all, as a number (`36_500_000`, `"36.5M"`) or a multiple
            of the plain model's (`"2x"`, `2.0`).  More than E plain models have is not used.
        templates_per_layer: how many templates a layer of a member combines; fewer where its bank has fewer, more where
            a bank has templates that would be left over.
        assignment: "shared", the layer combines the same templates in all members, or "disjoint", members combine
            different ones as long as there are any (the paper's setting for ImageNet).
        bank_single_layers: a group of a single layer has templates too, where otherwise it is one plain layer shared
            by all members (the paper's thin models).
        single_blob: one flat blob of parameters for all layers, reshaped for each (the paper's smallest models).
        keep_weights: begin around the plain model, whose weights are the mean of the members': needs a budget with at
            least as many templates as layers in each group.
        spread: with `keep_weights`, how far members begin from the plain model, relative to its weights, about.

    Attributes:
        banks: a :class:`TemplateBank` for each group by name, or `blob`.

    Example:
        >>> import torch, effens_kernels as ek
        >>> layers = [layer for _ in range(8) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), *layers, torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "mixture", num_members=4, budget="2x")
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([4, 32, 4])
        >>> ensemble.summary().rows[1]
        ('Linear_64x64', 8, 15, 5, 61440, 552)
        >>> optimizer = torch.optim.SGD(ensemble.optimizer_groups(weight_decay=5e-4), lr=0.1, momentum=0.9)
    """

    def __init__(
        self,
        model: nn.Module,
        num_members: int,
        banks: dict[str, TemplateBank],
        shares: list[Share],
        budget: int,
        plain: int,
    ) -> None:
        super().__init__(model, num_members)
        self.banks = nn.ModuleDict(banks)
        self.shares, self.budget, self.plain = shares, budget, plain

    def optimizer_groups(self, weight_decay: float, *, decay_norms: bool = True) -> list[dict[str, object]]:
        """Parameters for an optimizer, coefficients without weight decay, which would pull members towards 0.

        Args:
            weight_decay: of all other parameters.
            decay_norms: also of BatchNorm's; the paper has them with CIFAR (True) and leaves them out with ImageNet.
        """
        free: list[nn.Parameter] = []
        for module in self.modules():
            if isinstance(module, Mixture):
                free.append(module.coefficients)
            elif isinstance(module, _EnsembleBatchNorm) and not decay_norms:
                free.extend(module.parameters())
        return self._optimizer_groups(free, weight_decay)

    def summary(self) -> Summary:
        """A row for each group: its layers and templates, and the parameters that members share and have each."""
        shared, own = sum(s.shared for s in self.shares), sum(s.per_member for s in self.shares)
        total = shared + self.num_members * own
        return Summary(
            f"Mixture ensemble of {self.num_members} members",
            ("group", "layers", "templates", "per layer", "shared", "per member"),
            tuple(map(tuple, self.shares)),
            ("all", None, None, None, shared, own),
            (
                f"{total:,} parameters in all, {total / self.plain:.2f} times the plain model",
                f"{self.budget - total:,} of the budget of {self.budget:,} are left over",
                f"{self.num_members * self.plain:,} in {self.num_members} plain models",
            ),
        )


def convert(
    sites: Sites,
    num_members: int,
    budget: int | float | str = "1x",
    templates_per_layer: int = _budget.TEMPLATES_PER_LAYER,
    assignment: str = "shared",
    bank_single_layers: bool = False,
    single_blob: bool = False,
    keep_weights: bool = False,
    spread: float = 0.5,
) -> MixtureEnsemble:
    """The method "mixture"; its options are those of :class:`MixtureEnsemble`."""
    positive("convert", templates_per_layer=templates_per_layer)
    if assignment not in ASSIGNMENTS:
        reject("convert", "assignment", f"one of {', '.join(map(repr, ASSIGNMENTS))}", repr(assignment))
    for name, setting in (("assignment='disjoint'", assignment == "disjoint"), ("single_blob=True", single_blob)):
        if keep_weights and setting:
            reject("convert", "keep_weights", f"False with {name}", repr(keep_weights))
    chosen = [site.module for site in sites.of((*LAYERS, *NORMS))]
    layers = [module for module in chosen if type(module) in LAYERS]
    norms = [module for module in chosen if type(module) in NORMS]
    if not layers:
        reject("convert", "model", "with Linear or Conv2d layers to convert", "one without")
    groups = _groups(layers)
    sizes = [group.size for group in groups]

    plain, norm_parameters = count([sites.model]), count(norms)
    as_they_are = plain - count(chosen)
    others = as_they_are + num_members * norm_parameters
    rule = Rule(num_members, templates_per_layer, assignment == "disjoint", bank_single_layers, others)
    limit = _budget.parameters(budget, plain)

    build = _Build(num_members, rule.disjoint)
    if single_blob:
        build.blob(layers, groups, *_budget.blob(sizes, limit, rule))
    else:
        plan = _budget.plan(sizes, limit, rule)
        if keep_weights:
            _refuse_to_forget(groups, plan, limit, rule)
        for group, templates in zip(groups, plan):
            if templates:
                build.bank(group, templates, rule.combined(templates, len(group.layers)))
            else:
                build.one_layer(group)
        if keep_weights:
            for group in groups:
                build.keep(group, spread)
    for norm in norms:
        build.layers[norm] = NORMS[type(norm)].from_batchnorm(norm, num_members, tiled=True)
    if norms:
        build.shares.append(Share("BatchNorm", len(norms), None, None, 0, norm_parameters))
    if as_they_are:
        build.shares.append(Share("shared as they are", None, None, None, as_they_are, 0))
    model = replaced(sites.model, build.layers)
    return MixtureEnsemble(model, num_members, build.banks, build.shares, limit, plain)


class _Build:
    """New layers by old, the banks they refer to, and what became of each group."""

    def __init__(self, num_members: int, disjoint: bool) -> None:
        self.num_members, self.disjoint = num_members, disjoint
        self.layers: dict[nn.Module, nn.Module] = {}
        self.banks: dict[str, TemplateBank] = {}
        self.shares: list[Share] = []

    def bank(self, group: Group, templates: int, combined: int) -> None:
        """A bank for the layers of a group, which take their templates in turn."""
        weights = [layer.weight for layer in group.layers]
        bank = TemplateBank(templates, group.shape, std=rms(weights), **_place(weights[0]))
        bank.lie_like(weights[0])
        self.banks[group.name] = bank
        end = 0
        for layer in group.layers:
            end = self._mixture(layer, bank, combined, end)
        own = combined * len(group.layers) + group.size.biases
        self.shares.append(Share(group.name, len(group.layers), templates, combined, bank.templates.numel(), own))

    def blob(self, layers: list[nn.Module], groups: list[Group], numbers: int, combined: list[int]) -> None:
        """One blob, of which layers take parts in the order of the model."""
        places = {(layer.weight.device, layer.weight.dtype) for layer in layers}
        if len(places) > 1:
            reject("convert", "model", "of one device and dtype with single_blob=True", f"layers of {len(places)}")
        squares = sum(
            layer.weight.numel() * (rms([layer.weight]) or usual_std(layer.weight.shape)) ** 2 for layer in layers
        )
        std = (squares / sum(layer.weight.numel() for layer in layers)) ** 0.5
        self.banks["blob"] = bank = TemplateBank(numbers, std=std, **_place(layers[0].weight))
        per_layer = {layer: k for group, k in zip(groups, combined) for layer in group.layers}
        end = 0
        for layer in layers:
            end = self._mixture(layer, bank, per_layer[layer], end)
        self.shares.append(Share("blob", len(layers), None, None, numbers, 0))
        for group, k in zip(groups, combined):
            own = k * len(group.layers) + group.size.biases
            self.shares.append(Share(f"  {group.name}", len(group.layers), numbers // group.size.weight, k, 0, own))

    def one_layer(self, group: Group) -> None:
        """Copies that have one weight, of the first layer, for all members; biases stay each layer's own."""
        first = copy.deepcopy(group.layers[0].weight)
        for layer in group.layers:
            self.layers[layer] = copy.deepcopy(layer, {id(layer.weight): first})
        shared = group.size.weight + group.size.biases
        self.shares.append(Share(f"{group.name} (one weight for all)", len(group.layers), None, None, shared, 0))

    def keep(self, group: Group, spread: float) -> None:
        """Each layer's weight in a template of its own, which all members take once; the rest cancels out."""
        layers = [self.layers[layer] for layer in group.layers]
        if not isinstance(layers[0], Mixture):
            return
        runs = [layer.templates_of(0) for layer in layers]
        for plain, layer, run, template in zip(group.layers, layers, runs, _one_of_each(runs)):
            layer.begin_around(plain.weight, run.index(template), spread)

    def _mixture(self, layer: nn.Module, bank: TemplateBank, combined: int, start: int) -> int:
        """The layer of members in place of a plain one; returns where the next layer's templates start."""
        options = {"bank": bank, "start": start, "disjoint": self.disjoint, "std": rms([layer.weight]), "tiled": True}
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            new = MixtureLinear(layer.in_features, layer.out_features, self.num_members, combined, bias, **options)
        else:
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size, self.num_members, combined
            how = layer.stride, layer.padding, layer.dilation, layer.groups, bias, layer.padding_mode
            new = MixtureConv2d(*sizes, *how, **options)
        if bias:
            new.bias = nn.Parameter(layer.bias.detach().repeat(self.num_members, 1), layer.bias.requires_grad)
        self.layers[layer] = new.train(layer.training)
        return new.run.end


def count(modules: Iterable[nn.Module]) -> int:
    """Parameters of the modules, each once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _groups(layers: list[nn.Module]) -> list[Group]:
    alike: dict[tuple, list[nn.Module]] = {}
    for layer in layers:
        alike.setdefault((type(layer), tuple(layer.weight.shape), *_place(layer.weight).values()), []).append(layer)
    groups, seen = [], Counter()
    for (kind, shape, *_), members in alike.items():
        name = f"{kind.__name__}_{'x'.join(map(str, shape))}"
        seen[name] += 1  # more than once: of several dtypes or devices
        groups.append(Group(name if seen[name] == 1 else f"{name}_{seen[name]}", shape, members))
    return groups


def _place(weight: Tensor) -> dict[str, object]:
    return {"device": weight.device, "dtype": weight.dtype}


def _refuse_to_forget(groups: list[Group], plan: list[int], budget: int, rule: Rule) -> None:
    """Each weight of the plain model needs a template, unless it is the only one of a plain layer."""
    sizes = [group.size for group in groups]

    def forgetting(plan: list[int]) -> Group | None:
        return next((g for g, n in zip(groups, plan) if max(n, 1) < len(g.layers)), None)

    group = forgetting(plan)
    if group is not None:
        least = _budget.smallest(lambda budget: forgetting(_budget.plan(sizes, budget, rule)) is None, budget)
        expected = f"at least {least:,} to keep the weights of {len(group.layers)} layers {group.name} in templates"
        reject("convert", "budget", expected, f"{budget:,}")


def _one_of_each(runs: list[list[int]]) -> list[int]:
    """A template out of each run, all different, by augmenting paths.

    There are such where runs take as many templates each in turn and there are at least as many templates as runs.
    """
    taken: dict[int, int] = {}  # by which run

    def take(run: int, seen: set[int]) -> bool:
        for template in runs[run]:
            if template not in seen:
                seen.add(template)
                if template not in taken or take(taken[template], seen):
                    taken[template] = run
                    return True
        return False

    for run in range(len(runs)):
        take(run, set())
    chosen = {run: template for template, run in taken.items()}
    return [chosen[run] for run in range(len(runs))]
