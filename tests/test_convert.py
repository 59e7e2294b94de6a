"""ek.convert: members equal plain models, budgets hold, templates go round, and user's models stay what they are."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.ensembles import _budget
from effens_kernels.nn import EnsembleBatchNorm2d, MixtureConv2d, MixtureLinear
from examples.wide_resnet import WideResNet

E, B = 3, 4
DOUBLE = {"dtype": torch.float64}
MIXTURES = (MixtureLinear, MixtureConv2d)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def mixtures(ensemble: nn.Module) -> list[nn.Module]:
    return [module for module in ensemble.modules() if isinstance(module, MIXTURES)]


class Net(nn.Module):
    """Convolutions in two groups, one of them with biases, and a part that is used twice."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)
        )
        self.twice = nn.Conv2d(8, 8, 1)
        self.alias = self.twice
        self.other = nn.Conv2d(8, 8, 1)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.alias(torch.tanh(self.twice(x))) + self.other(x)
        x = x.mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


def mlp(layers: int, width: int = 8, **options: object) -> nn.Sequential:
    hidden = [layer for _ in range(layers) for layer in (nn.Linear(width, width, **options), nn.Tanh())]
    return nn.Sequential(*hidden)


SETTINGS = {
    "shared": {},
    "disjoint": {"assignment": "disjoint", "budget": "2x"},
    "large": {"budget": "5x", "bank_single_layers": True},
    "small": {"budget": 0.8},
    "blob": {"single_blob": True, "budget": "0.7x"},
    "blob, disjoint": {"single_blob": True, "assignment": "disjoint", "budget": "1x"},
    "kept": {"budget": "1.3x", "keep_weights": True},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


# ----------------------------------------------------------------------------------------------------------- values


@settings
@pytest.mark.parametrize("training", [True, False])
def test_members_are_plain_models(setting, training):
    """Results, statistics of BatchNorm, and gradients: of templates, the sum of those of the members' weights."""
    ensemble = ek.convert(Net().double(), "mixture", E, **SETTINGS[setting]).train(training)
    members = [ensemble.member(e) for e in range(E)]
    x = torch.randn(B, 3, 6, 5, **DOUBLE)
    y = ensemble(x)
    assert y.shape == (E, B, 5)
    expected = [member(x) for member in members]
    close(y, torch.stack(expected))
    for e, member in enumerate(members):
        assert [type(m) for m in member.modules()] == [type(m) for m in Net().modules()]
        assert member.twice is member.alias
        state = ensemble.member(e).state_dict()
        for name, value in member.state_dict().items():
            close(state[name], value)

    grad = torch.randn_like(y)
    (y * grad).sum().backward()
    for e in range(E):
        (expected[e] * grad[e]).sum().backward()
    modules = dict(ensemble.model.named_modules())
    banks = {bank: torch.zeros_like(bank.templates) for bank in ensemble.banks.values()}
    for path, layer in modules.items():
        plain = [member.get_submodule(path) for member in members]
        if isinstance(layer, MIXTURES):
            size = torch.Size(layer.shape).numel()
            for e, one in enumerate(plain):
                for k, t in enumerate(layer.templates_of(e)):
                    at = slice(t, t + 1) if layer.bank.shape else slice(t, t + size)
                    template = layer.bank.templates[at].view(layer.shape)
                    close(layer.coefficients.grad[e, k], (template * one.weight.grad).sum())
                    banks[layer.bank][at] += layer.coefficients[e, k].detach() * one.weight.grad.view(
                        banks[layer.bank][at].shape
                    )
                if layer.bias is not None:
                    close(layer.bias.grad[e], one.bias.grad)
        elif isinstance(layer, EnsembleBatchNorm2d):
            close(layer.weight.grad, torch.stack([one.weight.grad for one in plain]))
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            close(layer.weight.grad, sum(one.weight.grad for one in plain))
    for bank, expected_grad in banks.items():
        close(bank.templates.grad, expected_grad)


def test_rows_of_each_member():
    ensemble = ek.convert(Net().double(), "mixture", E).eval()
    x = torch.randn(E, B, 3, 6, 5, **DOUBLE)
    y = ensemble(x, per_member=True)
    for e in range(-E, E):
        close(y[e], ensemble.member(e)(x[e]))


def test_inputs_and_results_of_any_structure():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(3)

        def forward(self, x: Tensor, pair: tuple, *, scale: float, shift: dict) -> dict:
            y = self.layers(x) * scale + pair[0] + shift["by"]
            return {"y": y, "rest": [y.sum(1), (pair[1], torch.max(y, 1))]}

    ensemble = ek.convert(Many().double(), "mixture", E)
    x, a, c = torch.randn(3, B, 8, **DOUBLE)
    result = ensemble(x, (a, "name"), scale=2.0, shift={"by": c})
    for e in range(E):
        expected = ensemble.member(e)(x, (a, "name"), scale=2.0, shift={"by": c})
        close(result["y"][e], expected["y"])
        close(result["rest"][0][e], expected["rest"][0])
        name, largest = result["rest"][1]
        assert name == "name"
        assert torch.equal(largest.indices[e], expected["rest"][1][1].indices)


def test_sequences_and_batchnorm1d():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm, self.by_channel = nn.LayerNorm(8), nn.BatchNorm1d(8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.first(self.embedding(tokens)))  # [B, L, 8]
            return self.second(self.by_channel(x.transpose(1, 2)).transpose(1, 2)).mean(1)

    ensemble = ek.convert(Tokens().double(), "mixture", E, budget="2x").eval()
    tokens = torch.randint(11, (B, 6))
    y = ensemble(tokens)
    for e in range(E):
        close(y[e], ensemble.member(e)(tokens))
    assert ensemble.summary().rows[-1] == ("shared as they are", None, None, None, 11 * 8 + 16, 0)


def test_the_given_model_stays_as_it_is():
    model = Net().double()
    before, modules = copy.deepcopy(model.state_dict()), [(id(m), type(m)) for m in model.modules()]
    ensemble = ek.convert(model, "mixture", E)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    ensemble(torch.randn(B, 3, 6, 5, **DOUBLE))
    assert [(id(m), type(m)) for m in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_kept_of_the_model():
    model = Net()
    model.eval()
    model.blocks[1].train()
    model.head.weight.requires_grad_(False)
    model.blocks[0][1].running_mean.normal_()
    model.to(memory_format=torch.channels_last)
    ensemble = ek.convert(model, "mixture", E)
    assert not ensemble.training
    assert [m.training for m in ensemble.model.modules() if isinstance(m, EnsembleBatchNorm2d)] == [False, True, False]
    assert not ensemble.model.head.weight.requires_grad
    assert torch.equal(ensemble.model.stem.weight, model.stem.weight)
    assert torch.equal(ensemble.model.blocks[0][1].running_mean[2], model.blocks[0][1].running_mean)
    assert torch.equal(ensemble.model.twice.bias, model.twice.bias.expand(E, -1))
    assert type(ensemble.model) is Net
    templates = ensemble.banks["Conv2d_8x8x3x3"].templates
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in templates)
    assert ensemble.member(0).blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_begin_as_large_as_the_models():
    """Of each layer, whatever its initialization was."""
    model = mlp(4, 60)
    for n, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        nn.init.normal_(layer.weight, std=0.1 * (n + 1))
    for options in ({}, {"single_blob": True}, {"budget": "5x", "assignment": "disjoint"}):
        for n, layer in enumerate(mixtures(ek.convert(model, "mixture", E, **options))):
            scale = layer.fold()[0].flatten(1).std(1) / (0.1 * (n + 1))
            torch.testing.assert_close(scale, torch.ones(E), rtol=0, atol=0.1)


def test_member_draws_no_random_numbers():
    ensemble = ek.convert(Net(), "mixture", E)
    state = torch.get_rng_state()
    ensemble.member(1)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- templates and budgets


def assigned(ensemble: nn.Module) -> list[list[list[int]]]:
    """By layer, then member: templates; one list for a layer whose members have the same."""
    runs = [[layer.templates_of(e) for e in range(ensemble.num_members)] for layer in mixtures(ensemble)]
    return [run[:1] if all(r == run[0] for r in run) else run for run in runs]


def with_templates(layers: int, templates: int, members: int, k: int, disjoint: bool = False) -> nn.Module:
    """`layers` equal layers without biases, and a budget of exactly so many templates and the coefficients."""
    budget = templates * 64 + members * layers * min(k, templates)
    how = {"templates_per_layer": k, "assignment": "disjoint" if disjoint else "shared"}
    return ek.convert(mlp(layers, bias=False), "mixture", members, budget=budget, **how)


def test_round_robin():
    """By hand: 4 layers of 3 templates out of 5."""
    assert assigned(with_templates(4, 5, E, 3)) == [[[0, 1, 2]], [[3, 4, 0]], [[1, 2, 3]], [[4, 0, 1]]]
    assert assigned(with_templates(3, 2, E, 5)) == [[[0, 1]]] * 3
    assert assigned(with_templates(3, 6, E, 2)) == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_disjoint():
    """By hand: members of a layer take the next templates each, and start over when there are no more."""
    first, second, third, *_ = assigned(with_templates(6, 12, 3, 2, True))
    assert [first, second] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert third == first
    assert assigned(with_templates(3, 8, 3, 2, True))[:2] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [0, 1], [2, 3]]]
    assert assigned(with_templates(3, 5, 2, 2, True)) == [[[0, 1], [2, 3]], [[4, 0], [1, 2]], [[3, 4], [0, 1]]]


def test_no_template_is_left_unused():
    """More are combined where a bank has more than its layers would take."""
    ensemble = ek.convert(mlp(2, bias=False), "mixture", 4, budget=7 * 64 + 8 * 4, templates_per_layer=3)
    assert assigned(ensemble) == [[[0, 1, 2, 3]], [[4, 5, 6, 0]]]
    assert count(ensemble) == ensemble.budget


@pytest.mark.parametrize("options", [{}, {"single_blob": True}])
def test_no_more_templates_than_a_plain_ensemble_has_weights(options):
    ensemble = ek.convert(mlp(4, bias=False), "mixture", 3, budget="10x", **options)
    (bank,) = ensemble.banks.values()
    assert bank.templates.numel() == 3 * 4 * 64
    assert f"{ensemble.budget - count(ensemble):,} of the budget" in ensemble.summary().notes[1]


def test_blob_parts_in_the_order_of_the_model():
    model = nn.Sequential(
        nn.Linear(4, 4, False), nn.Linear(4, 8, False), nn.Linear(8, 4, False), nn.Linear(4, 4, False)
    )
    budget = 100 + 2 * (2 + 2 + 2 + 2)
    ensemble = ek.convert(model, "mixture", 2, budget=budget, single_blob=True, templates_per_layer=2)
    assert [[layer.templates_of(0), layer.run.end] for layer in mixtures(ensemble)] == [
        [[0, 16], 32],
        [[32, 64], 96],
        [[36, 68], 0],  # moved back to the end
        [[0, 16], 32],
    ]


def test_shares_and_remainders():
    """By hand, of groups with shares of 3.4 and 3.4 templates of 100 and 10: 3 and 3 whole, then 44 for 10's, up to
    twice its share."""
    sizes = [_budget.Size(100, 4, 0), _budget.Size(10, 4, 0)]
    rule = _budget.Rule(members=4, per_layer=2, disjoint=False, bank_single_layers=False, others=0)
    coefficients = 4 * 8 * 2
    assert _budget.plan(sizes, 374 + coefficients, rule) == [3, 7]
    assert _budget.plan(sizes, 330 + coefficients, rule) == [3, 3]
    assert _budget.plan(sizes, 444 + coefficients, rule) == [4, 4]


def test_too_small_a_share_becomes_one_layer_for_all():
    """Layers of a group with less than a template have one weight, and so have all members."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), *(nn.Conv2d(20, 20, 3) for _ in range(2)))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            return self.parts[:6](x) + self.parts[6:](image).sum((1, 2, 3))[:, None]

    ensemble = ek.convert(Both().double(), "mixture", E, budget=3600 + 40 + 6 * 8 * E + 3 * 64 + 90)
    convs = ensemble.model.parts[6:]
    assert [type(m) for m in convs] == [nn.Conv2d] * 2
    assert convs[0].weight is convs[1].weight
    assert convs[0].bias is not convs[1].bias
    assert ("Conv2d_20x20x3x3 (one weight for all)", 2, None, None, 3640, 0) in ensemble.summary().rows
    x, image = torch.randn(B, 8, **DOUBLE), torch.randn(B, 20, 5, 5, **DOUBLE)
    y = ensemble(x, image)
    for e in range(E):
        member = ensemble.member(e)
        assert member.parts[6].weight is member.parts[7].weight
        close(y[e], member(x, image))
    assert copy.deepcopy(ensemble).model.parts[6].weight.data_ptr() != convs[0].weight.data_ptr()


@pytest.mark.parametrize("budget", ["1x", "1.5x", 2.0, 0.6, 30_000, 3e4, "30k", "0.03M"])
@pytest.mark.parametrize(
    "options", [{}, {"bank_single_layers": True}, {"assignment": "disjoint"}, {"single_blob": True}]
)
def test_the_budget_is_all_there_is(budget, options):
    model = WideResNet(16, 2, 5, base=4)
    plain = count(model)
    expected = {"1x": plain, "1.5x": 1.5 * plain, 2.0: 2 * plain, 0.6: 0.6 * plain}.get(budget, 30_000)
    ensemble = ek.convert(model, "mixture", E, budget=budget, **options)
    summary = ensemble.summary()
    assert ensemble.budget == round(expected)
    assert 0.95 * expected < count(ensemble) <= ensemble.budget
    shared, each = (sum(row[column] for row in summary.rows) for column in (4, 5))
    assert summary.total[-2:] == (shared, each)
    assert shared + E * each == count(ensemble)
    assert summary.notes[0].startswith(f"{count(ensemble):,} parameters in all")
    left = ensemble.budget - count(ensemble)
    assert summary.notes[1] == f"{left:,} of the budget of {ensemble.budget:,} are left over"


@pytest.mark.parametrize(
    "options", [{}, {"bank_single_layers": True}, {"assignment": "disjoint"}, {"single_blob": True}]
)
def test_the_smallest_budget_works(options):
    model = Net()
    with pytest.raises(
        ValueError, match=r"budget should be at least [\d,]+ parameters, to hold a .*, got 1$"
    ) as raised:
        ek.convert(model, "mixture", E, budget=1, **options)
    least = int(str(raised.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert count(ek.convert(model, "mixture", E, budget=least, **options)) <= least
    with pytest.raises(ValueError, match=f"at least {least:,} parameters.* got {least - 1:,}$"):
        ek.convert(model, "mixture", E, budget=least - 1, **options)


def test_keep_weights():
    model = Net().double()
    ensemble = ek.convert(model, "mixture", 4, budget="2x", keep_weights=True, spread=0.1)
    for path, layer in ensemble.model.named_modules():
        if isinstance(layer, MIXTURES):
            weights, plain = layer.fold()[0], model.get_submodule(path).weight
            close(weights.mean(0), plain)
            assert 0 < (weights - plain).norm() / plain.norm() < 0.3
    x = torch.randn(B, 3, 6, 5, **DOUBLE)
    close(ek.convert(model, "mixture", 1, budget="2x", keep_weights=True).eval()(x)[0], model.eval()(x))
    for layers, templates, k in [(7, 7, 5), (4, 10, 5), (6, 6, 3), (5, 8, 2), (6, 9, 6)]:
        budget = templates * 64 + 3 * layers * max(k, -(-templates // layers))
        plain = mlp(layers, bias=False).double()
        kept = ek.convert(plain, "mixture", 3, budget=budget, keep_weights=True, templates_per_layer=k)
        assert kept.banks["Linear_8x8"].templates.shape[0] == templates
        for layer, linear in zip(mixtures(kept), plain[::2]):
            close(layer.fold()[0].mean(0), linear.weight)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("setting", ["shared", "disjoint", "blob"])
def test_training_reduces_the_loss(setting):
    torch.manual_seed(0)
    ensemble = ek.convert(mlp(4, 16), "mixture", E, **SETTINGS[setting])
    x = torch.randn(64, 16)
    target = torch.tanh(x @ torch.randn(16, 16) / 4)
    optimizer = torch.optim.SGD(ensemble.optimizer_groups(weight_decay=1e-4), lr=0.2, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(60):
        loss = (ensemble(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    members = ensemble(x)
    assert (members[0] - members[1]).abs().mean() > 1e-3


def test_optimizer_groups():
    ensemble = ek.convert(Net(), "mixture", E)
    ensemble.model.head.weight.requires_grad_(False)
    trained = {id(p) for p in ensemble.parameters()} - {id(ensemble.model.head.weight)}
    coefficients = {id(layer.coefficients) for layer in mixtures(ensemble)}
    norms = {id(p) for m in ensemble.modules() if isinstance(m, EnsembleBatchNorm2d) for p in m.parameters()}
    for decay_norms, free in ((True, coefficients), (False, coefficients | norms)):
        decayed, spared = ensemble.optimizer_groups(5e-4, decay_norms=decay_norms)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
        assert {id(p) for p in spared["params"]} == free
        assert {id(p) for p in decayed["params"]} == trained - free
        assert len(decayed["params"]) + len(spared["params"]) == len(trained)


# --------------------------------------------------------------------------------------------------- as an nn.Module


def test_state_dict_lists_banks_once():
    ensemble = ek.convert(Net(), "mixture", E)
    names = list(ensemble.state_dict())
    templates = [name for name in names if "templates" in name]
    assert templates == [f"banks.{g}.templates" for g in ("Conv2d_8x8x3x3", "Conv2d_8x8x1x1")]
    assert "model.blocks.0.0.coefficients" in names
    assert "model.blocks.0.1.running_mean" in names
    ids = [id(p) for p in ensemble.parameters()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("setting", ["disjoint", "blob"])
def test_copies(how, setting):
    def make() -> nn.Module:
        return ek.convert(Net(), "mixture", E, **SETTINGS[setting])

    original = make().eval()
    x = torch.randn(B, 3, 6, 5)
    expected = original(x)
    if how == "deepcopy":
        other = copy.deepcopy(original)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(original))
    else:
        other = make().eval()
        other.load_state_dict(original.state_dict())
    assert torch.equal(other(x), expected)
    assert other.model.twice is other.model.alias
    assert count(other) == count(original)
    assert {id(layer.bank) for layer in mixtures(other)} == {id(bank) for bank in other.banks.values()}
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(original(x), expected)


def test_moves():
    ensemble = ek.convert(Net(), "mixture", E).eval()
    x = torch.randn(B, 3, 6, 5)
    expected = ensemble(x)
    ensemble.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ensemble(x), expected, rtol=1e-4, atol=1e-5)
    wide = ensemble.double()(x.double())
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-5)
    assert ensemble.to("meta")(x.double().to("meta")).shape == (E, B, 5)


def test_on_meta_and_then_not():
    with torch.device("meta"):
        model = Net()
    ensemble = ek.convert(model, "mixture", E)
    assert {t.device.type for t in ensemble.state_dict().values()} == {"meta"}
    assert ensemble.member(1).stem.weight.is_meta
    real = ek.convert(Net(), "mixture", E).eval()
    ensemble.to_empty(device="cpu").eval()
    ensemble.load_state_dict(real.state_dict())
    x = torch.randn(B, 3, 6, 5)
    assert torch.equal(ensemble(x), real(x))


@pytest.mark.parametrize("setting", ["shared", "disjoint", "blob"])
def test_compiled(setting):
    ensemble = ek.convert(Net(), "mixture", E, **SETTINGS[setting])
    compiled = torch.compile(copy.deepcopy(ensemble), fullgraph=True, backend="aot_eager")
    x = torch.randn(B, 3, 6, 5)
    results = []
    for module in (ensemble, compiled):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_summary_prints():
    pytest.importorskip("rich")
    summary = ek.convert(Net(), "mixture", E).summary()
    text = str(summary)
    for words in (
        "Mixture ensemble of 3 members",
        "Conv2d_8x8x3x3",
        "templates",
        "per member",
        "left over",
        "BatchNorm",
    ):
        assert words in text
    with pytest.raises(NotImplementedError):
        ek.ensembles.Ensemble(Net(), E).summary()


# ---------------------------------------------------------------------------------------------- which layers, and how


def test_include_and_exclude():
    def converted(**options: object) -> set[str]:
        ensemble = ek.convert(Net(), "mixture", E, **options)
        plain = dict(Net().named_modules())
        return {path for path, m in ensemble.model.named_modules() if type(m) is not type(plain[path])}

    convs = {f"blocks.{n}.0" for n in range(3)}
    norms = {f"blocks.{n}.1" for n in range(3)}
    pair = {"twice", "other"}
    single = {"bank_single_layers": True, "budget": "2x"}
    assert converted() == convs | norms | pair
    assert converted(**single) == convs | norms | pair | {"stem", "hidden", "head"}
    assert converted(exclude="blocks") == pair
    assert converted(exclude=["blocks.*.1", "other"], **single) == convs | {"twice", "stem", "hidden", "head"}
    assert converted(include=nn.Conv2d) == convs | pair
    assert converted(include=["blocks"]) == convs | norms
    assert converted(include=["blocks", nn.Linear], exclude=nn.BatchNorm2d) == convs
    assert converted(exclude="alias") == convs | norms  # one of two names


def test_layers_of_different_types_and_dtypes_are_groups_of_their_own():
    dtypes = torch.float32, torch.float64, torch.bfloat16
    model = nn.Sequential(*(nn.Linear(8, 8, dtype=dtype) for dtype in dtypes for _ in range(2)))
    ensemble = ek.convert(model, "mixture", E, budget="2x")
    assert {name: bank.templates.dtype for name, bank in ensemble.banks.items()} == {
        "Linear_8x8": torch.float32,
        "Linear_8x8_2": torch.float64,
        "Linear_8x8_3": torch.bfloat16,
    }


def test_one_member():
    ensemble = ek.convert(Net().double(), "mixture", 1).eval()
    x = torch.randn(B, 3, 6, 5, **DOUBLE)
    close(ensemble(x)[0], ensemble.member(0)(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(3)
        self.layers[4].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(2)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def hooked() -> nn.Module:
    model = mlp(2)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def weight_normed() -> nn.Module:
    model = mlp(2)
    torch.nn.utils.parametrizations.weight_norm(model[2])
    return model


def converted(model: nn.Module | None = None, **options: object) -> ek.ensembles.Ensemble:
    options = {"method": "mixture", "num_members": E, **options}
    return ek.convert(Net() if model is None else model, **options)


BAD = {
    "model": (lambda: converted("model"), TypeError, "convert: model should be a torch.nn.Module, got str"),
    "method": (lambda: converted(method="mean"), ValueError, "convert: method should be one of 'mixture', "),
    "members": (lambda: converted(num_members=0), ValueError, "convert: num_members should be at least 1, got 0"),
    "members_type": (lambda: converted(num_members=2.0), TypeError, "convert: num_members should be an int, got 2.0"),
    "option": (
        lambda: converted(budgets=3),
        TypeError,
        "convert: budgets should be an option of 'mixture': budget, templates_per_layer, assignment",
    ),
    "budget": (lambda: converted(budget=0), ValueError, "convert: budget should be a number of parameters"),
    "budget_text": (
        lambda: converted(budget="2y"),
        ValueError,
        "or a multiple of the plain model (\"2x\", 2.0), got '2y'",
    ),
    "budget_type": (lambda: converted(budget=None), TypeError, "convert: budget should be a number of parameters"),
    "budget_nan": (lambda: converted(budget=float("nan")), ValueError, "convert: budget should be a number"),
    "assignment": (lambda: converted(assignment="own"), ValueError, "assignment should be one of 'shared', 'disjoint'"),
    "per_layer": (lambda: converted(templates_per_layer=0), ValueError, "templates_per_layer should be at least 1"),
    "keep_blob": (
        lambda: converted(keep_weights=True, single_blob=True),
        ValueError,
        "convert: keep_weights should be False with single_blob=True, got True",
    ),
    "keep_disjoint": (
        lambda: converted(keep_weights=True, assignment="disjoint"),
        ValueError,
        "keep_weights should be False with assignment='disjoint'",
    ),
    "all_different": (
        lambda: converted(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))),
        ValueError,
        "convert: model should be with two layers of one type and shape, to share templates (bank_single_layers=True",
    ),
    "nothing": (lambda: converted(nn.Tanh()), ValueError, "model should be with Linear or Conv2d layers to convert"),
    "type": (
        lambda: converted(nn.Sequential(mlp(2), nn.Sequential(nn.LSTM(8, 8)))),
        ValueError,
        "made of Linear, Conv2d, BatchNorm1d, BatchNorm2d and modules without parameters (exclude=['1.0'] shares it as "
        "it is), got LSTM at '1.0'",
    ),
    "own_parameter": (lambda: converted(Own()), ValueError, "got Own at 'the model itself'"),
    "sync_batchnorm": (
        lambda: converted(nn.Sequential(mlp(2), nn.SyncBatchNorm(8, affine=False))),
        ValueError,
        "got SyncBatchNorm at '1'",
    ),
    "hooks": (
        lambda: converted(hooked()),
        ValueError,
        "without hooks on layers to be replaced, got Linear at '0' with",
    ),
    "parametrized": (lambda: converted(weight_normed()), ValueError, "at '2'"),
    "tied": (lambda: converted(Tied()), ValueError, "got weight of 'layers.4' tied to 'layers.0'"),
    "twice": (
        lambda: converted(converted()),
        ValueError,
        "convert: model should be plain, got MixtureEnsemble at 'the mod",
    ),
    "twice_inside": (
        lambda: converted(nn.Sequential(mlp(2), ek.nn.EnsembleLinear(8, 8, 3))),
        ValueError,
        "convert: model should be plain, got EnsembleLinear at '1'",
    ),
    "pattern": (
        lambda: converted(exclude="block"),
        ValueError,
        "convert: exclude should be types and paths of modules in the model, got 'block', which is not",
    ),
    "pattern_type": (
        lambda: converted(include=[3]),
        TypeError,
        "convert: include should be types and paths of modules",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)


def test_too_small_to_keep_weights():
    with pytest.raises(
        ValueError, match=r"budget should be at least [\d,]+ to keep the weights of 3 layers Conv2d_8x8x3x3"
    ):
        ek.convert(Net(), "mixture", E, budget="0.9x", keep_weights=True)


def test_bad_calls():
    ensemble = ek.convert(Net(), "mixture", E)
    with pytest.raises(ValueError, match=r"input should be \[E=3, B, ...\] with per_member=True, got float32\[4, 3"):
        ensemble(torch.zeros(4, 3, 6, 5), per_member=True)
    with pytest.raises(IndexError, match=r"MixtureEnsemble: member should be in \[-3, 3\), got 3"):
        ensemble.member(E)
    with pytest.raises(TypeError, match="MixtureEnsemble: member should be an int, got True"):
        ensemble.member(True)

    class Mean(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    with pytest.raises(
        ValueError, match=r"the model's result should be \[E\*B, ...\], one row for each of the input's"
    ):
        ek.convert(Mean(mlp(2)), "mixture", E)(torch.zeros(B, 8))


def test_a_budget_works_from_the_least_that_the_message_names():
    """However coefficients and templates trade against each other in so small a model."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def refused(budget: int) -> str | None:
        try:
            ek.convert(model, "mixture", num_members=4, budget=budget)
        except ValueError as error:
            return str(error)
        return None

    (least,) = {int(re.search(r"at least ([\d,]+) ", refused(budget))[1]) for budget in (48, 60, 70)}
    assert all((refused(budget) is None) == (budget >= least) for budget in range(48, 140))


def test_running_statistics_of_all_members_together_are_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    )
    with pytest.raises(ValueError, match="InstanceNorm2d at '1'"):
        ek.convert(model, "mixture", num_members=2, budget="1x")
