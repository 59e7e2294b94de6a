"""The MixtureEnsembles paper's numbers of parameters, on models without memory (the meta device)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import effens_kernels as ek
from effens_kernels.ensembles import MixtureEnsemble
from effens_kernels.nn import EnsembleBatchNorm2d, MixtureConv2d, MixtureLinear
from examples.resnet import ResNet
from examples.wide_resnet import WideResNet

MODELS = {
    "WRN-28-10": lambda: WideResNet(28, 10, 100),
    "WRN-28-5": lambda: WideResNet(28, 5, 100),
    "ResNet-50": lambda: ResNet(),
}


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_plain_models():
    assert count(model("WRN-28-10")) == 36_536_884
    assert count(model("ResNet-50")) == 25_557_032
    assert 4 * count(model("WRN-28-10")) == pytest.approx(146e6, rel=0.01)
    assert 4 * count(model("ResNet-50")) == pytest.approx(102.4e6, rel=0.01)


BUDGETS = [  # the tables of the paper, figure 3, and its settings
    ("WRN-28-10", "36.5M", {}),
    ("WRN-28-10", "120M", {}),
    ("WRN-28-10", "15M", {}),
    ("WRN-28-10", "7M", {"single_blob": True}),
    ("WRN-28-5", "36.5M", {"bank_single_layers": True}),
    ("ResNet-50", "25.6M", {"assignment": "disjoint"}),
    ("ResNet-50", "51.2M", {"assignment": "disjoint"}),
]


@pytest.mark.parametrize(("name", "budget", "options"), BUDGETS, ids=lambda value: str(value))
def test_budgets(name, budget, options):
    ensemble = ek.convert(model(name), "mixture", num_members=4, budget=budget, **options)
    total = count(ensemble)
    exact = float(budget[:-1]) * 1e6
    assert 0.99 * exact <= total <= exact
    assert ensemble.budget == exact
    shared, each = ensemble.summary().total[-2:]
    assert shared + 4 * each == total
    layers = [m for m in ensemble.modules() if isinstance(m, (MixtureLinear, MixtureConv2d))]
    own = [p for layer in layers for p in layer.parameters()]
    norms = [p for m in ensemble.modules() if isinstance(m, EnsembleBatchNorm2d) for p in m.parameters()]
    assert 4 * each == sum(p.numel() for p in own + norms)
    used = unused_templates(ensemble)
    assert not any(used.values()), f"templates that nobody takes: {used}"


@pytest.mark.parametrize("budget", ["36.5M", "120M"])
def test_a_member_costs_105_coefficients(budget):
    """And a few thousand numbers of BatchNorm: all of what a member adds."""
    two, three = (ek.convert(model("WRN-28-10"), "mixture", members, budget=budget) for members in (2, 3))
    layers = [m for m in three.modules() if isinstance(m, MixtureConv2d)]
    assert len(layers) == 21
    assert sum(layer.coefficients.shape[1] for layer in layers) == 105
    norms = sum(count(m) for m in model("WRN-28-10").modules() if isinstance(m, nn.BatchNorm2d))
    assert norms == 17_952
    assert two.summary().total[-1] == three.summary().total[-1] == 105 + norms


def test_groups_of_wrn_28_10():
    """Three banks for 7 equal convolutions each; everything that has no equal is one layer for all members."""
    rows = ek.convert(model("WRN-28-10"), "mixture", 4, budget="36.5M").summary().rows
    banked = {name: (layers, templates, k) for name, layers, templates, k, *_ in rows if templates}
    assert banked == {
        "Conv2d_160x160x3x3": (7, 6, 5),  # the 4 members' BatchNorm is paid with one of these
        "Conv2d_320x320x3x3": (7, 7, 5),
        "Conv2d_640x640x3x3": (7, 7, 5),
    }
    alone = [name for name, layers, templates, *_ in rows if layers == 1 and templates is None]
    assert len(alone) == 8
    low = ek.convert(model("WRN-28-10"), "mixture", 4, budget="15M").summary().rows
    assert [(t, k) for _, _, t, k, *_ in low if t] == [(5, 5), (4, 4), (2, 2)]


def test_thin_model_banks_everything():
    thin = ek.convert(model("WRN-28-5"), "mixture", 4, budget="36.5M", bank_single_layers=True)
    assert {type(m) for m in thin.model.modules()} & {nn.Conv2d, nn.Linear} == set()
    assert len(thin.banks) == 11


def test_blob_has_all_layers():
    small = ek.convert(model("WRN-28-10"), "mixture", 4, budget="7M", single_blob=True)
    assert {type(m) for m in small.model.modules()} & {nn.Conv2d, nn.Linear} == set()
    assert list(small.banks) == ["blob"]
    assert count(small) == 7_000_000
    starts = [m.run.start for m in small.modules() if isinstance(m, MixtureConv2d) and m.shape[:2] == (640, 640)]
    assert len(set(starts)) > 1  # each weight is half of the blob: layers take different halves


def unused_templates(ensemble: MixtureEnsemble) -> dict[str, int]:
    unused = {}
    for name, bank in ensemble.banks.items():
        if not bank.shape:
            continue
        layers = [m for m in ensemble.modules() if getattr(m, "bank", None) is bank]
        used = {t for layer in layers for e in range(ensemble.num_members) for t in layer.templates_of(e)}
        unused[name] = len(bank.templates) - len(used)
    return unused
