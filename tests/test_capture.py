"""Ensembles as CUDA graphs; and where there is no GPU, that nothing in them would wait for one.

On meta tensors, which are on no host and have no values, whatever needs values fails.  Besides, no call may take
tensors of host and device together, or copy from one to the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from stack_cases import CASES, B
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import effens_kernels as ek
from effens_kernels.testing import OPS

E = 3
GPU = [
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to capture on"))
]


def mixture(**options: object) -> nn.Module:
    images = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    layers = nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8)
    plain = nn.Sequential(nn.Unflatten(1, (1, 3, 6)), *images, *layers)
    return ek.convert(plain, "mixture", E, budget="3x", **options)


def stacked(name: str) -> nn.Module:
    return ek.stack([CASES[name].make() for _ in range(E)])


class Layers(nn.Module):
    """One of each layer that no ensemble above has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ek.nn.BatchEnsembleConv2d(1, 4, 3, E, padding=1)
        self.layers = nn.Sequential(
            ek.nn.EnsembleBatchNorm2d(4, E),
            nn.Flatten(2),
            ek.nn.EnsembleLinear(72, 8, E, activation="gelu"),
            ek.nn.EnsembleLayerNorm(8, E),
            ek.nn.BatchEnsembleLinear(8, 8, E, activation="silu"),
            ek.nn.MixtureLinear(8, 8, E, 2, disjoint=True),
            ek.nn.MultiHeadLinear(8, 2, 3, E),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.first(x.unflatten(1, (1, 3, 6)).float()))


HOST = "rows", "attention"  # whose forward code makes tensors on the host
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"stack-{name}": partial(stacked, name) for name in CASES if name not in HOST},
    "ensemble_mlp": lambda: ek.nn.EnsembleMLP(18, [16, 16], 2, E, num_heads=2, shared_layers=1),
    "rank1_mlp": lambda: ek.nn.BatchEnsembleMLP(18, [16], 2, E),
    "mixture": mixture,
    "mixture-disjoint": partial(mixture, assignment="disjoint", bank_single_layers=True),
    "mixture-blob": partial(mixture, single_blob=True),
    "layers": Layers,
}
CAPTURED = ("stack-mlp", "stack-conv2d", "stack-encoder", "ensemble_mlp", "rank1_mlp", "mixture", "layers")


def inputs(name: str) -> tuple[Tensor, ...]:
    stack = name.startswith("stack-")
    return CASES[name.removeprefix("stack-")].inputs(()) if stack else (torch.randn(B, 18),)


def tensors(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def loss_of(result: object) -> Tensor:
    return sum(t.square().mean() for t in tensors(result))


# ---------------------------------------------------------------------------------------------------- without a GPU


class NoCopies(TorchDispatchMode):
    """Refuses calls that take or give tensors of host and device.  A number, which is a tensor without axes, may come
    from the host: kernels take it as an argument."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = {t.device.type for t in tensors((args, kwargs, result)) if t.dim() or t.is_meta}
        if len(found) > 1:
            raise AssertionError(f"{func} takes or gives tensors of {' and '.join(sorted(found))}")
        return result


class NoConstants(TorchFunctionMode):
    """Refuses tensors that are made of Python's numbers on the device, which are copies too, of what no call shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
            raise AssertionError(f"{func.__name__} copies from the host")
        return result


@contextmanager
def no_host() -> Iterator[None]:
    with NoConstants(), NoCopies():
        yield


def on_meta(t: Tensor | None) -> Tensor | None:
    """Where it lies in memory, it does there."""
    if t is None or not t.is_floating_point():
        return t if t is None else t.to("meta")
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta", requires_grad=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models_wait_for_nothing(name, training):
    ensemble = MODELS[name]().to("meta").train(training)
    given = [on_meta(t) for t in inputs(name)]
    with no_host():
        result = ensemble(*given)
        loss_of(result).backward()
    assert all(t.is_meta for t in tensors(result))
    assert any(p.grad is not None for p in ensemble.parameters())


@pytest.mark.parametrize("name", OPS)
def test_ops_wait_for_nothing(name, seed):
    op = OPS[name]
    for case in op.cases:
        given = [on_meta(t) for t in case.inputs_for(seed=seed)]
        options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.options().items()}
        with no_host():
            y = op.call(*given, **options)
            y.sum().backward()
        assert y.is_meta


@pytest.mark.parametrize(
    "predict",
    [
        ek.ensemble_predict,
        lambda t: ek.ensemble_predict_regression(t, t.exp()),
        lambda t: (ek.metrics.log_mean_softmax(t),),
    ],
    ids=["classes", "regression", "log_mean_softmax"],
)
def test_predictions_wait_for_nothing(predict):
    logits = on_meta(torch.randn(E, 5, 4))
    with no_host():
        loss_of(predict(logits)).backward()
    assert logits.grad.shape == logits.shape


def test_what_waits_is_seen():
    """What the tests above would fail of, and what they would not."""
    x = torch.randn(4, 3, device="meta")
    for wrong in (
        lambda: x.sum().item(),
        lambda: x.cpu(),
        lambda: x.tolist(),
        lambda: x[x > 0],
        lambda: bool(x.sum() > 0),
        lambda: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda: x[torch.tensor([0, 2])],
        lambda: ek.nn.EnsembleBatchNorm1d(3, E, momentum=None, device="meta")(x),  # a Python number of each member
    ):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), no_host():
            wrong()
    with no_host():
        (x * torch.tensor(2.0) + 1).clamp_min(torch.zeros_like(x))


# -------------------------------------------------------------------------------------------------------- on a GPU


def captured(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """As PyTorch asks for: some calls on another stream, then one that is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def same(actual: object, expected: object) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("name", CAPTURED)
def test_graph_of_forward(name, device):
    ensemble = MODELS[name]().to(device).eval()
    given = [t.to(device) for t in inputs(name)]
    with torch.no_grad():
        graph, result = captured(lambda: ensemble(*given))
        for _ in range(3):
            for t, new in zip(given, inputs(name)):
                t.copy_(new)
            graph.replay()
            same(result, ensemble(*given))


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("name", CAPTURED)
def test_graph_of_a_training_step(name, device):
    """Forward, loss, backward and a capturable optimizer; parameters and running statistics after some replays."""
    ensemble = MODELS[name]().to(device)
    given = [t.to(device) for t in inputs(name)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(*given))
        loss.backward()
        optimizer.step()
        return loss.detach()  # a tape that lives on would tie the parameters to the stream of the capture

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True, capturable=True)

    optimizer = adam(ensemble)
    graph, loss = captured(lambda: step(ensemble, optimizer))
    eager = copy.deepcopy(ensemble)
    its_own = adam(eager)
    its_own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        for t, new in zip(given, inputs(name)):
            t.copy_(new)
        graph.replay()
        same(loss, step(eager, its_own))
    same(list(ensemble.state_dict().values()), list(eager.state_dict().values()))


@pytest.mark.parametrize("device", GPU)
def test_graph_of_a_prediction(device):
    """Logits of an ensemble, and what it says of them."""
    ensemble = MODELS["mixture"]().to(device).eval()
    x = torch.randn(B, 18, device=device)
    with torch.no_grad():
        graph, found = captured(lambda: ek.ensemble_predict(ensemble(x)))
        for _ in range(2):
            x.copy_(torch.randn(B, 18))
            graph.replay()
            same(found, ek.ensemble_predict(ensemble(x)))
