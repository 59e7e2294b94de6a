"""Members whose dropout has probabilities of their own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import effens_kernels as ek

RATES = (0.0, 0.2, 0.65, 1.0)
E = len(RATES)
KINDS = {nn.Dropout: (), nn.Dropout1d: (5,), nn.Dropout2d: (3, 2), nn.Dropout3d: (2, 3, 2)}


class Dropping(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(())), drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x * self.scale)


def mlp(p: float) -> nn.Module:
    return nn.Sequential(
        nn.Dropout(p), nn.Linear(6, 16), nn.ReLU(), nn.Dropout(p / 2), nn.Linear(16, 3), nn.Dropout(0.1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_member_drops_with_its_own_probability(kind, inplace, dtype):
    """What is kept is scaled by 1 / (1 - p); 0 and 1 are exact; gradients are the same mask's."""
    ensemble = ek.stack([Dropping(kind(p, inplace=inplace)) for p in RATES]).to(dtype)
    assert torch.equal(ensemble.drop.p, torch.tensor(RATES, dtype=torch.float64))
    x = torch.rand(200, 40, *KINDS[kind]).to(dtype) + 0.5
    x.requires_grad_()
    y = ensemble(x)
    ratio = (y / x).detach().float()
    if kind is not nn.Dropout:  # whole features
        ratio = ratio.flatten(3)
        assert torch.equal((ratio == 0).all(-1), (ratio == 0).any(-1))
        ratio = ratio[..., 0]
    assert torch.equal(y[0], x)
    assert not y[3].any()
    for e in (1, 2):
        expected = torch.tensor(1 / (1 - RATES[e])).expand_as(ratio[e])
        torch.testing.assert_close(ratio[e], expected * (ratio[e] != 0), rtol=0.02, atol=0)
        deviation = (RATES[e] * (1 - RATES[e]) / ratio[e].numel()) ** 0.5
        assert abs((ratio[e] == 0).float().mean().item() - RATES[e]) < 6 * deviation
    assert not torch.equal(ratio[1] == 0, ratio[2] == 0)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(grad.float(), (y / x).detach().float().sum(0), rtol=0.03, atol=1e-6)
    assert torch.equal(ensemble.eval()(x), x.expand(E, *x.shape))


def test_without_a_batch():
    for kind, shape in ((nn.Dropout1d, (50, 4)), (nn.Dropout3d, (50, 2, 2, 2))):
        y = ek.stack([Dropping(kind(p)) for p in (0.5, 0.4)])(torch.ones(shape)).flatten(2)
        assert torch.equal((y == 0).all(-1), (y == 0).any(-1))
        assert (y == 0).any()


def test_the_same_noise():
    """randomness="same": what a member drops, those of larger p drop too."""
    kept = ek.stack([Dropping(nn.Dropout(p)) for p in RATES], randomness="same")(torch.ones(500)) != 0
    assert all((kept[e + 1] <= kept[e]).all() for e in range(E - 1))


def test_members_come_back_with_their_own():
    ensemble = ek.stack([mlp(p) for p in RATES]).bfloat16()
    ensemble = ek.stack(ek.unstack(ensemble))  # again
    for model, p in zip(ek.unstack(ensemble), RATES):
        assert [type(m) for m in model] == [type(m) for m in mlp(p)]
        assert [model[n].p for n in (0, 3, 5)] == [p, p / 2, 0.1]
        assert repr(model) == repr(mlp(p))
        assert not list(model.buffers())
    assert [ek.ensembles.take_members(ensemble, [2, 0]).get_submodule("0").p.tolist()] == [[0.65, 0.0]]
    assert "0.p" not in ensemble.state_dict()
    ensemble.load_state_dict(ek.stack([mlp(0.5) for _ in RATES]).state_dict())


def test_copies_pickles_and_compiled_ones_drop_alike():
    ensemble, x = ek.stack([mlp(p) for p in RATES]), torch.randn(9, 6)
    file = io.BytesIO()
    torch.save(ensemble, file)
    file.seek(0)
    others = copy.deepcopy(ensemble), torch.load(file, weights_only=False)

    def seeded(run) -> Tensor:
        torch.manual_seed(3)
        return run(x)

    assert all(torch.equal(seeded(other), seeded(ensemble)) for other in others)
    compiled = torch.compile(ensemble, fullgraph=True, backend="eager")
    torch.testing.assert_close(seeded(compiled), seeded(ensemble))
    ensemble.eval()
    torch.testing.assert_close(ensemble(x), torch.stack([model(x) for model in ek.unstack(ensemble)]))


def test_a_training_step_of_members_without_noise_is_theirs():
    """p of 0 and 1 are deterministic: gradients against the members' own."""
    models = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(p), nn.Linear(8, 3)).double() for p in (0.0, 1.0)]
    ensemble, x = ek.stack(models), torch.randn(5, 6).double()
    ensemble(x).square().sum().backward()
    for e, model in enumerate(models):
        model(x).square().sum().backward()
        for path, p in model.named_parameters():
            torch.testing.assert_close(ensemble.get_parameter(path).grad[e], p.grad, rtol=1e-12, atol=1e-12)
