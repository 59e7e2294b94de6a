"""pad_widths: models of different widths in one ensemble compute and train as they would alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek
from effens_kernels.ensembles import pad_widths, unpad_widths

WIDTHS = (5, 9, 1)


def mlp(width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    hidden = nn.Linear(7, width), activation(), nn.Linear(width, 2 * width, bias=False), nn.BatchNorm1d(2 * width)
    return nn.Sequential(*hidden, nn.Tanh(), nn.Linear(2 * width, 3))


class Images(nn.Module):
    """A skip, a depthwise and a transposed convolution, features that are flattened channel-major, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.back = nn.ConvTranspose2d(2 * width, width, 1)
        self.act, self.drop = nn.PReLU(width), nn.Dropout(0.0)
        self.head = nn.Linear(width * 9, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.act(self.norm(self.first(x)))
        h = h + self.back(self.depthwise(h)).relu()
        return {"y": self.head(self.drop(nn.functional.max_pool2d(h, 2)).flatten(1))}


class Tied(nn.Module):
    """A weight in two modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width, padding_idx=2)
        self.inner = nn.Bilinear(width, width, width + 1)
        self.between = nn.Linear(width + 1, width)
        self.out = nn.Linear(width, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor, more: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.out(self.between(self.inner(x, torch.sin(x)))) * more


CASES: dict[str, tuple[Callable[[int], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (mlp, lambda: (torch.randn(6, 7).double(),)),
    "images": (Images, lambda: (torch.randn(4, 2, 6, 6).double(),)),
    "tied": (Tied, lambda: (torch.randint(11, (5, 2)), torch.randn(5, 1, 1).double())),
}


def result(y: Tensor | dict[str, Tensor]) -> Tensor:
    return y["y"] if isinstance(y, dict) else y


def made(name: str) -> tuple[list[nn.Module], list[nn.Module], Callable[[], tuple[Tensor, ...]]]:
    make, inputs = CASES[name]
    models = [make(width).double() for width in WIDTHS]
    return models, pad_widths(models, inputs()), inputs


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def members_values(ensemble: ek.ensembles.StackedEnsemble, like: list[nn.Module]) -> list[dict[str, Tensor]]:
    return [model.state_dict() for model in unpad_widths(ek.unstack(ensemble), like)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_models(name, training):
    models, padded, inputs = made(name)
    ensemble, x = ek.stack(padded).train(training), inputs()
    y = result(ensemble(*x))
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    for e, model in enumerate(models):
        own = result(model.train(training)(*x))
        close(y[e], own)
        own.backward(cotangent[e])
        wide = dict(ensemble.named_parameters())
        for path, p in model.named_parameters():
            region = tuple(slice(size) for size in p.shape)
            grad = wide[path].grad[e].clone()
            close(grad[region], p.grad)
            grad[region] = 0
            assert not grad.any(), path
    for state, model in zip(members_values(ensemble, models), models):  # running statistics too
        for path, value in model.state_dict().items():
            close(state[path].double(), value.double())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-3),
    "ensemble_adamw": lambda p: ek.optim.EnsembleAdamW(p, lr=0.01, weight_decay=0.1, eps=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "images"])
def test_training_is_separate_training(name, optimizer):
    models, padded, inputs = made(name)
    ensemble = ek.stack(padded)
    ours = OPTIMIZERS[optimizer](ensemble.parameters())
    theirs = [OPTIMIZERS[optimizer.removeprefix("ensemble_")](model.parameters()) for model in models]
    for _ in range(5):
        x = inputs()
        ours.zero_grad()
        result(ensemble(*x)).square().mean((1, 2)).sum().backward()
        ours.step()
        for model, own in zip(models, theirs):
            own.zero_grad()
            result(model(*x)).square().mean().backward()
            own.step()
    for state, model in zip(members_values(ensemble, models), models):
        for path, value in model.state_dict().items():
            torch.testing.assert_close(state[path].double(), value.double(), rtol=1e-8, atol=1e-8)
    again = [model.state_dict() for model in pad_widths(models, inputs())]  # padding is 0 still
    for path, p in ensemble.named_parameters():
        torch.testing.assert_close(p.detach(), torch.stack([state[path] for state in again]), rtol=1e-8, atol=1e-8)
        assert torch.equal(p == 0, torch.stack([state[path] for state in again]) == 0)


def test_the_models_stay_and_come_back():
    models, padded, _ = made("images")
    before = [copy.deepcopy(model.state_dict()) for model in models]
    assert {str(dict(m.named_modules())["depthwise"]) for m in padded} == {str(Images(9).depthwise)}
    for model, state, back in zip(models, before, unpad_widths(padded, models)):
        assert repr(back) == repr(model)
        assert all(
            torch.equal(model.state_dict()[k], v) and torch.equal(back.state_dict()[k], v) for k, v in state.items()
        )
    tied = made("tied")[1][0]
    assert tied.out.weight is tied.embedding.weight


def test_equal_widths_are_left_alone():
    models = [mlp(4), mlp(4)]
    padded = pad_widths(models, torch.randn(3, 7))
    assert all(torch.equal(a, b) for m, p in zip(models, padded) for a, b in zip(m.parameters(), p.parameters()))


def test_random_numbers_are_left_alone():
    models, x = [Images(3), Images(2)], torch.randn(2, 2, 6, 6)
    before = torch.get_rng_state()
    pad_widths(models, x)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------- bad input


def between(make: Callable[[int], nn.Module]) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(7, w), make(w), nn.Linear(w, 3)) for w in (8, 4)]


class Mean(nn.Module):
    """Mixes features in code that no list of modules shows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


GROUPED = [nn.Sequential(nn.Unflatten(1, (w, 1)), nn.Conv1d(w, w, 1, groups=2)) for w in (8, 4)]
REFUSED = {
    "layer norm": (between(nn.LayerNorm), "models[1].1.weight (LayerNorm) should be of one shape in all models"),
    "group norm": (between(lambda w: nn.GroupNorm(2, w)), "models[1].1.weight (GroupNorm) should be of one shape"),
    "plain layer norm": (between(lambda w: nn.LayerNorm(w, elementwise_affine=False)), "models[1].1.normalized_shape"),
    "sigmoid": (between(lambda w: nn.Sigmoid()), "models[1].2.weight should be without gradients of its padding"),
    "softplus": (between(lambda w: nn.Softplus()), "models[1].2.weight should be without gradients of its padding"),
    "in training": (between(lambda w: nn.AlphaDropout()), "models[1].2.weight should be without gradients of its pad"),
    "mean": (between(lambda w: Mean()), "models[1] should be the same model when padded"),
    "softmax": (between(lambda w: nn.Softmax(-1)), "models[1] should be the same model when padded"),
    "outputs": ([nn.Linear(7, 3), nn.Linear(7, 2)], "models[1] should be the same model when padded"),
    "groups": (GROUPED, "models[1].1.weight (Conv1d) should be of one shape in all models, or depthwise"),
    "kernel": ([nn.Conv1d(7, 3, k) for k in (1, 2)], "models[1].weight (Conv1d) should be of one shape after 2 axes"),
    "recurrent": ([nn.GRU(7, w) for w in (3, 2)], "models[1].weight_ih_l0 (GRU) should be of one shape"),
    "other types": ([mlp(3), mlp(3, nn.SiLU)], "models[1].1: SiLU, in models[0] ReLU"),
    "none": ([], "models should be at least one model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    models, said = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(said)):
        pad_widths(models, torch.randn(6, 8 if name == "groups" else 7))


def test_no_models():
    with pytest.raises(TypeError, match=r"pad_widths: models should be a list of torch.nn.Modules, got Linear"):
        pad_widths(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(TypeError, match=r"unpad_widths: like should be a list of torch.nn.Modules"):
        unpad_widths([nn.Linear(2, 2)], 3)


def test_no_way_back():
    with pytest.raises(ValueError, match="unpad_widths: like should be 1 models, one for each, got 2"):
        unpad_widths([mlp(3)], [mlp(3), mlp(2)])
    with pytest.raises(ValueError, match=re.escape("like[0].0.weight should be at most [3, 7], as padded, got [4, 7]")):
        unpad_widths([mlp(3)], [mlp(4)])
    with pytest.raises(ValueError, match=re.escape("like[0] should be of the architecture of models[0]")):
        unpad_widths([mlp(3)], [nn.Linear(2, 2)])
