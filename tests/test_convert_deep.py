"""ek.convert(model, "deep", ...): members are what constructors make, each of its seed, and as given where meant."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from stack_cases import CASES
from torch import Tensor, nn

import effens_kernels as ek

E, B = 3, 4


def convert(model: nn.Module, **options: object) -> ek.ensembles.StackedEnsemble:
    return ek.convert(model, "deep", options.pop("num_members", E), **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, state(b)[name]) for name, value in state(a).items())


def marked(model: nn.Module, value: float = 7.0) -> nn.Module:
    """A model that no constructor makes."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(value)
    return model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.5))
        self.alias = self.trunk[0]
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(torch.tanh(self.norm(self.stem(x))).mean(2))) * self.scale


# Models whose constructors draw every part once, in the order of registration.
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "tokens": CASES["tokens"].make,
    "statistics": CASES["statistics"].make,
    "recurrent": CASES["recurrent"].make,
    "conv2d": CASES["conv2d"].make,
    "mlp": CASES["mlp"].make,
    "groups": lambda: nn.Sequential(nn.Bilinear(3, 3, 2), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.EmbeddingBag(3, 4)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_member_is_what_the_constructor_makes(name):
    """With the same bits, of its seed, whatever the given model's values are; the random state stays."""
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
        for part in model.modules():
            if hasattr(part, "running_mean"):
                part.running_mean.fill_(7.0)
    before = copy.deepcopy(state(model))
    seeds = torch.randint(2**31, (E,)).tolist()
    random = torch.get_rng_state()
    members = ek.unstack(convert(model, seeds=seeds))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[n]) for n, value in state(model).items())
    for seed, member in zip(seeds, members):
        torch.manual_seed(seed)
        assert equal(member, ARCHITECTURES[name]())
        assert [type(m) for m in member.modules()] == [type(m) for m in model.modules()]
    torch.manual_seed(seeds[1])
    alone = convert(model, num_members=1)
    assert equal(ek.unstack(alone)[0], members[1])


def test_members_differ_and_follow_the_random_state():
    model = Net()
    torch.manual_seed(5)
    first = convert(model)
    torch.manual_seed(5)
    second = convert(model)
    assert equal(first, second)
    for name in ("stem.weight", "trunk.0.weight", "trunk.2.bias", "head.weight"):
        p = first.get_parameter(name)
        assert len(p.flatten(1).unique(dim=0)) == E
    x = torch.randn(B, 2, 5)
    first.eval()
    y = first(x)
    for e, member in enumerate(ek.unstack(first)):
        torch.testing.assert_close(y[e], member(x), rtol=1e-4, atol=1e-5)
    assert first.get_submodule("trunk.0") is first.alias
    encoder = convert(CASES["encoder"].make())  # whose second layer torch.nn makes as a copy of the first
    layers = [encoder.get_parameter(f"2.layers.{n}.linear1.weight") for n in range(2)]
    assert not torch.equal(*layers)


def test_the_first_member_is_kept():
    model = Net().eval()
    model.norm.running_mean.normal_()
    first, *others = ek.unstack(convert(model, keep_first=True, seeds=range(E)))
    assert equal(first, model)
    for other, same in zip(others, ek.unstack(convert(model, seeds=range(E)))[1:]):
        assert equal(other, same)
        assert not other.norm.running_mean.any()
        assert not torch.equal(other.head.weight, model.head.weight)
    assert not first.training


def test_what_is_excluded_keeps_the_models_values():
    model = marked(Net())
    model.stem.weight.requires_grad_(False)

    def kept(**options: object) -> set[str]:
        members = ek.unstack(convert(model, **options))
        names = [{n for n, value in state(m).items() if torch.equal(value, state(model)[n])} for m in members]
        assert names[0] == names[1] == names[2]
        return names[0]

    stem, head = {"stem.weight", "stem.bias"}, {"head.weight", "head.bias"}
    norm = {n for n in state(model) if n.startswith("norm.")}
    assert kept() == {"scale"}
    assert kept(exclude=["stem", nn.BatchNorm1d]) == stem | norm | {"scale"}
    assert kept(include="head") == set(state(model)) - head
    ensemble = convert(model, include="head")
    assert ensemble.stem.weight.shape == (E, 4, 2, 3)
    assert not ensemble.stem.weight.requires_grad
    assert ensemble.head.weight.requires_grad


def test_attention_goes_with_its_output():
    model = marked(CASES["tokens"].make())
    members = ek.unstack(convert(model, exclude=nn.MultiheadAttention))
    for member in members:
        assert (member.attention.out_proj.weight == 7).all()
        assert (member.attention.in_proj_weight == 7).all()
        assert not (member.embedding.weight == 7).any()
    for member in ek.unstack(convert(model, include="attention")):
        assert not (member.attention.out_proj.weight == 7).any()
        assert not member.attention.out_proj.bias.any()
        assert (member.cross.out_proj.weight == 7).all()


def test_a_transformer_is_drawn_as_it_draws_itself():
    """By Xavier's rule, which it applies to all of its parts at the end; but not to those that are excluded."""
    model = marked(nn.Transformer(8, 2, 1, 1, 16, batch_first=True))
    bound = (6 / (8 + 16)) ** 0.5
    for member in ek.unstack(convert(model, exclude="decoder")):
        weight = member.encoder.layers[0].linear1.weight  # torch.nn.Linear's bound is 8 ** -0.5
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.9 * 8**-0.5
        assert all((p == 7).all() for p in member.decoder.parameters())


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.token = nn.Linear(3, 3), nn.Parameter(torch.full((3,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.token


class Drawn(Own):
    def reset_parameters(self) -> None:
        self.linear.reset_parameters()
        nn.init.normal_(self.token)


def test_init_draws_what_has_no_reset():
    calls: list[int] = []

    def init(model: nn.Module, member: int) -> None:
        calls.append(member)
        model.token.normal_()
        model.linear.bias.fill_(member)

    ensemble = convert(marked(Own()), init=init, seeds=[3, 1, 2], keep_first=True)
    assert calls == [1, 2]
    assert (ensemble.token[0] == 7).all()
    assert (ensemble.linear.weight[0] == 7).all()
    assert not (ensemble.linear.weight[1:] == 7).any()
    assert torch.equal(ensemble.linear.bias[1:], torch.tensor([[1.0], [2.0]]).expand(2, 3))
    torch.manual_seed(1)
    weight, token = nn.Linear(3, 3).weight, torch.randn(3)
    assert torch.equal(ensemble.linear.weight[1], weight)
    assert torch.equal(ensemble.token[1], token)

    kept = convert(marked(Own()), exclude=Own)
    assert (kept.token == 7).all()
    assert not (kept.linear.weight == 7).any()
    assert not (convert(marked(Drawn())).token == 7).any()
    inner = convert(marked(Drawn()), exclude="linear")
    assert (inner.linear.weight == 7).all()
    assert not (inner.token == 7).any()


def test_dropout():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    for randomness, alike in (("different", False), ("same", True)):
        kept = convert(marked(model), include="0", init=lambda model, e: marked(model), randomness=randomness)
        y = kept(torch.ones(B, 4))
        assert torch.equal(y[0], y[1]) is alike


def weight_normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def test_parametrized_modules_are_kept_or_drawn_by_init():
    model = weight_normed()
    kept = convert(model, exclude="1")
    assert (
        kept.state_dict()["1.parametrizations.weight.original1"] == model[1].parametrizations.weight.original1
    ).all()
    drawn = convert(model, init=lambda model, e: setattr(model[1], "weight", torch.randn(3, 3)))
    members = ek.unstack(drawn)
    assert not torch.equal(members[0][1].weight, members[1][1].weight)


BAD = {
    "own": (
        lambda: convert(Own()),
        ValueError,
        "model should be of modules with reset_parameters (init=... draws the others, exclude=[''] keeps them), "
        "got Own at 'the model itself' with token and without",
    ),
    "parametrized": (
        lambda: convert(weight_normed()),
        ValueError,
        "exclude=['1'] keeps them), got ParametrizedLinear at '1' with one",
    ),
    "nothing": (
        lambda: convert(nn.Tanh()),
        ValueError,
        "model should be with modules to initialize anew, got one without",
    ),
    "nothing_meant": (lambda: convert(Net(), include="trunk.1"), ValueError, "with modules to initialize anew"),
    "seeds": (lambda: convert(Net(), seeds=[1, 2]), ValueError, "seeds should be 3 ints, one for each member, got 2"),
    "seeds_type": (
        lambda: convert(Net(), seeds=[1, 2.0, 3]),
        TypeError,
        "convert: seeds should be None or 3 ints, got [",
    ),
    "seeds_int": (lambda: convert(Net(), seeds=1), TypeError, "convert: seeds should be None or 3 ints, got 1"),
    "init": (lambda: convert(Net(), init="normal"), TypeError, "convert: init should be None or a function"),
    "randomness": (
        lambda: convert(Net(), randomness="none"),
        ValueError,
        "randomness should be one of 'different', 'same'",
    ),
    "option": (lambda: convert(Net(), seed=1), TypeError, "an option of 'deep': keep_first, seeds, init, randomness"),
    "pattern": (lambda: convert(Net(), include="tail"), ValueError, "got 'tail', which is not"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, words = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)
