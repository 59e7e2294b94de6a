"""ek.stack: members equal the models of a loop, whatever their forward code does, and ek.unstack gives them back."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from stack_cases import CASES, B, E
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations as plain_type
from torch.utils import _pytree as pytree

import effens_kernels as ek
from effens_kernels.ops.grouped_linear import native

cases = pytest.mark.parametrize("name", CASES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE.get(actual.dtype, 0.0)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tensors(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def loss(result: object) -> Tensor:
    return sum((t * torch.linspace(0.1, 1.0, t.shape[-1], dtype=t.dtype)).square().sum() for t in tensors(result))


def typed(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Leaves of the dtype; tokens stay what they are."""
    return tuple(t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs)


def run(name: str, dtype: torch.dtype, training: bool, per_member: bool) -> None:
    """Forward and backward of the ensemble beside those of the models: results, gradients, buffers.  Then once more."""
    case = CASES[name]
    models = [case.make().to(dtype).train(training) for _ in range(E)]
    ensemble = ek.stack(models)
    inputs = typed(case.inputs((E,) if per_member else ()), dtype)
    own = typed(tuple(t.detach().clone() for t in inputs), dtype)

    expected = [model(*(t[e] if per_member else t for t in own)) for e, model in enumerate(models)]
    result = ensemble(*inputs, per_member=per_member)
    assert pytree.tree_structure(result) == pytree.tree_structure(expected[0])
    for one, all_of_them in zip(zip(*map(tensors, expected)), tensors(result)):
        close(all_of_them, torch.stack(one))

    sum(map(loss, expected)).backward()
    loss(result).backward()
    for t, mine in zip(inputs, own):
        if t.requires_grad:
            close(t.grad, mine.grad)
    parameters = dict(ensemble.named_parameters())
    for path, parameter in models[0].named_parameters():
        if parameter.grad is not None:
            close(parameters[path].grad, torch.stack([m.get_parameter(path).grad for m in models]))
    for path, buffer in ensemble.named_buffers():
        close(buffer, torch.stack([m.get_buffer(path) for m in models]))

    with torch.no_grad():
        for parameter in (*ensemble.parameters(), *(p for m in models for p in m.parameters())):
            parameter.mul_(0.5)
        result = ensemble(*inputs, per_member=per_member)
        expected = [model(*(t[e] if per_member else t for t in own)) for e, model in enumerate(models)]
    for one, all_of_them in zip(zip(*map(tensors, expected)), tensors(result)):
        close(all_of_them, torch.stack(one))


# ----------------------------------------------------------------------------------------------------------- values


NO_RULE = pytest.mark.filterwarnings("error:There is a performance drop")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[NO_RULE] * (n != "weight_norm")) for n in CASES])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per_member"])
def test_members_equal_the_models_of_a_loop(name, training, per_member):
    run(name, torch.float64, training, per_member)


@cases
def test_float32(name):
    run(name, torch.float32, True, False)


@cases
def test_inference(name):
    """Without gradients, where torch.nn has kernels for one member."""
    case = CASES[name]
    models = [case.make().eval() for _ in range(E)]
    inputs = case.inputs(())
    with torch.inference_mode():
        result = ek.stack(models)(*inputs)
        expected = [model(*inputs) for model in models]
    for one, all_of_them in zip(zip(*map(tensors, expected)), tensors(result)):
        close(all_of_them, torch.stack(one))


@cases
def test_one_member_alone(name):
    """It updates its own statistics."""
    case = CASES[name]
    models = [case.make() for _ in range(E)]
    ensemble = ek.stack(models)
    inputs = case.inputs(())
    before = {path: buffer.clone() for path, buffer in ensemble.named_buffers()}
    for e in (1, -1):
        expected, result = models[e](*inputs), ensemble(*inputs, member=e)
        for a, b in zip(tensors(expected), tensors(result)):
            close(b, a)
    for path, buffer in ensemble.named_buffers():
        assert torch.equal(buffer[0], before[path][0])
        close(buffer[1], models[1].get_buffer(path))


def test_one_model():
    model = CASES["conv2d"].make()
    x = torch.randn(B, 6)
    close(ek.stack([model])(x)[0], model(x))


def test_arguments_by_name_and_without_axes():
    models = [CASES["residual"].make().double() for _ in range(E)]
    x = torch.randn(E, B, 6, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    result = ek.stack(models)(x, scale=scale, per_member=True)
    close(result, torch.stack([model(x_e, scale=scale) for model, x_e in zip(models, x)]))


# -------------------------------------------------------------------------------------------------------- the calls


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that grouped_linear's kernels are called with, forward and backward."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for direction, at in (("fwd", 1), ("bwd", 2)):
        kernel = getattr(native, direction)

        def spy(*arguments, kernel=kernel, direction=direction, at=at):
            seen.append((direction, tuple(arguments[at].shape)))
            return kernel(*arguments)

        monkeypatch.setattr(native, direction, spy)
    return seen


def test_linear_layers_are_one_call_of_all_members(products):
    ensemble = ek.stack([CASES["mlp"].make() for _ in range(E)])
    ensemble(torch.randn(B, 6)).sum().backward()
    forward = [("fwd", (E, 8, 6)), ("fwd", (E, 5, 8))]
    assert products == forward + [("bwd", shape) for _, shape in reversed(forward)]


def test_linear_layers_within_attention_too(products):
    ensemble = ek.stack([CASES["tokens"].make() for _ in range(E)])
    ensemble(*CASES["tokens"].inputs(()))
    # The projections of one, and its output; those of the other, whose keys are not the queries.
    assert [shape for _, shape in products] == [(E, 24, 8), (E, 8, 8), (E, 8, 8), (E, 8, 6), (E, 8, 6), (E, 8, 8)]


def test_a_convolution_per_member():
    ensemble = ek.stack([nn.Conv2d(3, 4, 3) for _ in range(E)])
    x = torch.randn(B, 3, 8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ensemble(x)
    assert sum(event.name == "aten::convolution" for event in profile.events()) == E


def test_channels_last_stays():
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last) for _ in range(E)]
    ensemble = ek.stack(models)
    assert ensemble.get_parameter("0.weight")[1].is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(B, 3, 8, 8).to(memory_format=torch.channels_last)
    assert ensemble(x)[1].is_contiguous(memory_format=torch.channels_last)
    assert ek.unstack(ensemble)[1][0].weight.is_contiguous(memory_format=torch.channels_last)


@NO_RULE
def test_networks_of_channels_last_images():
    def network() -> nn.Module:
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)
        ends = nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        return nn.Sequential(*layers, *ends).to(memory_format=torch.channels_last)

    models = [network() for _ in range(E)]
    x = torch.randn(B, 3, 8, 8).to(memory_format=torch.channels_last)
    close(ek.stack(models)(x), torch.stack([model(x) for model in models]))


# ------------------------------------------------------------------------------------------------------- randomness


def test_dropout_differs_between_members():
    models = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)) for _ in range(E)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x = torch.randn(50, 6)
    different, same = ek.stack(models)(x), ek.stack(models, randomness="same")(x)
    assert ((different == 0) != (different[0] == 0))[1:].any()
    torch.testing.assert_close(same, same[:1].expand_as(same))
    assert 0.3 < (same == 0).float().mean() < 0.7
    assert torch.equal(ek.stack(models).eval()(x) == 0, torch.zeros_like(same, dtype=torch.bool))


def test_dropout_of_attention_and_of_recurrent_layers():
    attention = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True) for _ in range(E)]
    recurrent = [nn.LSTM(8, 4, num_layers=2, dropout=0.5) for _ in range(E)]
    x = torch.randn(B, 5, 8)
    for models in (attention, recurrent):
        ensemble = ek.stack(models)
        first, second = (tensors(ensemble(x))[0] for _ in range(2))
        assert not torch.equal(first, second)
        expected = [model.eval()(x) for model in models]
        for one, all_of_them in zip(zip(*map(tensors, expected)), tensors(ensemble.eval()(x))):
            close(all_of_them, torch.stack(one))


# -------------------------------------------------------------------------------------------------------- the module


@cases
def test_the_state_has_the_members_names(name):
    models = [CASES[name].make() for _ in range(E)]
    ensemble = ek.stack(models)
    assert [n for n, _ in ensemble.named_parameters()] == [n for n, _ in models[0].named_parameters()]
    assert [n for n, _ in ensemble.named_buffers()] == [n for n, _ in models[0].named_buffers()]
    state = ensemble.state_dict()
    assert list(state) == list(models[0].state_dict())
    for path, value in state.items():
        assert torch.equal(value, torch.stack([m.state_dict()[path] for m in models]))
    other = ek.stack([CASES[name].make() for _ in range(E)])
    other.load_state_dict(state)
    for path, value in other.state_dict().items():
        assert torch.equal(value, state[path])


@cases
def test_unstack_gives_the_same_bits(name):
    case = CASES[name]
    models = [case.make() for _ in range(E)]
    ensemble = ek.stack(models)
    again = ek.unstack(ensemble)
    inputs = case.inputs(())
    storages = {t.untyped_storage().data_ptr() for t in ensemble.state_dict().values() if t.numel()}
    for model, plain in zip(models, again):
        own = set()
        assert [plain_type(m) for m in plain.modules()] == [plain_type(m) for m in model.modules()]
        assert plain.state_dict().keys() == model.state_dict().keys()
        for path, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[path])
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
            assert not value.numel() or value.untyped_storage().data_ptr() not in storages
            own.add(value.untyped_storage().data_ptr())
        storages |= own
        for a, b in zip(tensors(plain(*inputs)), tensors(model(*inputs))):
            assert torch.equal(a, b)


def test_results_kept_in_attributes_are_unstacked_too():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen, self.offset = nn.Linear(6, 4), [], torch.ones(4)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.linear(x)
            self.seen.append(self.last + self.offset)
            return self.last

    ensemble = ek.stack([Keeps() for _ in range(E)])
    x = torch.randn(B, 6)
    y = ensemble(x)
    for e, model in enumerate(ek.unstack(ensemble)):
        close(model.last, y[e])
        close(model.seen[0], y[e] + 1)
        assert ek.stack([model])(x).shape == (1, B, 4)
        close(model(x), y[e])
    assert ensemble(x).shape == (E, B, 4)


def test_a_forward_of_an_objects_own_runs():
    """Assigned to one layer rather than to its class, also where nn.Sequential would compute it with the next one."""

    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * type(self).forward(self, x)

    def model(n: int) -> nn.Module:
        layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh())
        layers[n].forward = MethodType(doubled, layers[n])
        return layers

    x = torch.randn(B, 6)
    for n in range(4):
        models = [model(n) for _ in range(E)]
        close(ek.stack(models)(x), torch.stack([m(x) for m in models]))


def test_parts_are_indexed_as_in_the_members():
    def net() -> nn.Module:
        return nn.ModuleDict({"a": nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 2)])})

    ensemble = ek.stack([net() for _ in range(E)])
    assert ensemble["a"][-1] is ensemble.get_submodule("a.1")
    ensemble["a"][0].requires_grad_(False)
    assert [p.requires_grad for p in ensemble.parameters()] == [False, False, True, True]
    for wrong in (2, slice(1)):
        with pytest.raises((IndexError, TypeError)):
            ensemble["a"][wrong]


def test_unstack_after_training():
    """Weights, statistics, dtype and mode are those of the ensemble, and it stays as it is."""
    ensemble = ek.stack([CASES["conv2d"].make() for _ in range(E)])
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ensemble(torch.randn(B, 6)).square().sum().backward()
        optimizer.step()
    ensemble = ensemble.double().eval()
    x = torch.randn(B, 6, dtype=torch.float64)
    members = ek.unstack(ensemble)
    assert not any(module.training for member in members for module in member.modules())
    close(ensemble(x), torch.stack([member(x) for member in members]))
    before = ensemble(x)
    with torch.no_grad():
        for member in members:
            for p in member.parameters():
                p.zero_()
    assert torch.equal(ensemble(x), before)


def test_models_stay_as_they_are():
    models = [CASES["statistics"].make() for _ in range(E)]
    before = copy.deepcopy([m.state_dict() for m in models])
    ensemble = ek.stack(models)
    ensemble(torch.randn(B, 6)).sum().backward()
    for model, state in zip(models, before):
        assert all(torch.equal(value, state[path]) for path, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_ties_stay():
    ensemble = ek.stack([CASES["tied"].make() for _ in range(E)])
    assert ensemble.first.weight is ensemble.second.weight
    assert ensemble.second is ensemble.again
    for e, member in enumerate(ek.unstack(ensemble)):
        assert member.first.weight is member.second.weight
        assert member.second is member.again is member.layers[1]
        assert torch.equal(member.first.weight, ensemble.first.weight[e])


def test_buffers_and_frozen_parameters():
    models = [CASES["rows"].make() for _ in range(E)]
    for model in models:
        model.linear.weight.requires_grad_(False)
    ensemble = ek.stack(models)
    assert "constant" not in ensemble.state_dict()
    assert ensemble.constant.shape == (E, 2, 5)
    assert not ensemble.linear.weight.requires_grad
    assert ensemble.linear.bias.requires_grad
    ensemble(torch.randn(B, 6)).sum().backward()
    assert ensemble.linear.weight.grad is None
    assert not ek.unstack(ensemble)[0].linear.weight.requires_grad


def test_modes_follow_the_members_own_rules():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.train(False)
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.norm(x))

    ensemble = ek.stack([Frozen() for _ in range(E)])
    assert ensemble.training
    assert ensemble.norm.training  # nobody has called train yet
    ensemble.train()
    assert not ensemble.norm.training
    before = ensemble.norm.running_mean.clone()
    assert (ensemble(torch.ones(B, 6)) == 0).any()
    assert torch.equal(ensemble.norm.running_mean, before)
    ensemble.drop.eval()
    assert ensemble.training
    assert not (ensemble(torch.ones(B, 6)) == 0).any()


def test_repr_names_the_member():
    text = repr(ek.stack([CASES["mlp"].make() for _ in range(E)]))
    assert "num_members=3" in text
    assert "Linear(in_features=6, out_features=8" in text
