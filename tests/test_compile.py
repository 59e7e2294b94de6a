"""torch.compile, torch.export, opcheck and fake tensors: the op as PyTorch's compilers see it."""

from __future__ import annotations

import pytest
import torch
from common import derivatives, leaves, sample
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from effens_kernels import grouped_linear, multihead_linear, nn
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import OPS, LinearCase

OP_CASES = [
    LinearCase(3, 5, 7, 4),
    LinearCase(3, 5, 7, 4, shared=True, bias=False, activation="relu"),
    LinearCase(2, 4, 6, 3, activation="gelu", x_layout="transposed"),
    LinearCase(2, 4, 6, 3, shared=True, activation="silu", weight_layout="inner"),
    LinearCase(2, 0, 6, 3, activation="tanh"),
    LinearCase(2, 4, 6, 3, activation="tanh", x_layout="stepped"),
]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
# What the other compilers build on, without their minutes of C++ compilation.
AOT = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test profits from, or is hurt by, what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- the schemas


@pytest.mark.parametrize("save_preactivation", [False, True], ids=["plain", "save"])
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_forward(case, save_preactivation, seed):
    inputs = leaves(case.inputs_for(seed=seed))
    arguments = (*inputs, case.activation, save_preactivation, "cpu")
    torch.library.opcheck(torch.ops.effens_kernels.grouped_linear_fwd, arguments)


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_backward(case, need, seed):
    x, weight, _ = leaves(case.inputs_for(seed=seed))
    grad, saved = (torch.randn(case.members, case.batch, case.outputs) for _ in range(2))
    saved = saved if case.activation else torch.empty(0)
    arguments = (grad.requires_grad_(), x, weight, saved.requires_grad_(), case.activation, *need, "cpu")
    torch.library.opcheck(torch.ops.effens_kernels.grouped_linear_bwd, arguments)


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{name}-{case}") for name, op in OPS.items() for case in op.cases],
)
def test_fake_results_are_laid_out_as_real_ones(op, case, seed):
    """Shapes, strides, dtypes and devices of the result and all gradients, for every sample call."""

    def forward_and_backward(inputs):
        inputs = leaves(inputs)
        y = op.call(*inputs, **case.options(), backend="cpu")
        grads = torch.autograd.grad(y, [t for t in inputs if t is not None], torch.ones_like(y))
        return [(t.shape, t.stride(), t.dtype, t.device.type) for t in (y, *grads)]

    inputs = case.inputs_for(seed=seed)
    real = forward_and_backward(inputs)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in inputs]
        assert forward_and_backward(fakes) == real


def test_meta_tensors(seed):
    """Shapes without memory; nothing is computed, and automatic choice of a backend works."""
    x, weight, bias = (t.to("meta").requires_grad_() for t in LinearCase(3, 5, 7, 4).inputs_for(seed=seed))
    y = grouped_linear(x, weight, bias, activation="gelu")
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 5, 4), torch.float32)
    y.sum().backward()
    assert (weight.grad.device.type, weight.grad.shape) == ("meta", (3, 4, 7))
    layer = nn.EnsembleMLP(7, [5], 4, num_members=3, device="meta")
    assert layer(x).shape == (3, 5, 4)


# -------------------------------------------------------------------------------------------------- torch.compile


@activations
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_equals_eager(activation, shared, backend, seed):
    """One graph, and with our kernels the same bits."""

    def call(x, weight, bias):
        return grouped_linear(x, weight, bias, activation=activation, backend=backend) * 2

    inputs = LinearCase(3, 20, 30, 10, shared=shared).inputs_for(seed=seed)
    grad = torch.randn(3, 20, 10)
    compiled = torch.compile(call, fullgraph=True, backend=AOT)
    expected, actual = (derivatives(f, inputs, grad) for f in (call, compiled))
    tolerance = 1e-5 if backend == "reference" else 0  # aot_eager decomposes einsum
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic=True"])
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
def test_any_batch_is_one_graph(how, shared, seed):
    """Forward and backward with a batch size that changes compile once."""
    counter = CompileCounterWithBackend(AOT)

    def call(x, weight, bias):
        return grouped_linear(x, weight, bias, activation="gelu")

    compiled = torch.compile(call, fullgraph=True, dynamic=True if how == "dynamic=True" else None, backend=counter)
    for batch in (8, 5, 33, 2):
        inputs = LinearCase(3, batch, 6, 4, shared=shared).inputs_for(seed=seed)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(inputs[0], inputs[0].dim() - 2)
            for t in inputs:
                t.requires_grad_()
            actual = compiled(*inputs)
        else:
            actual = compiled(*leaves(inputs))
        exact = sample(
            "grouped_linear", LinearCase(3, batch, 6, 4, shared=shared, activation="gelu"), torch.float32, "cpu", seed
        ).exact
        torch.testing.assert_close(actual.detach().double(), exact["y"], rtol=1e-5, atol=1e-5)
        actual.sum().backward()
    assert counter.frame_count == 1


LAYERS = {
    "EnsembleLinear": lambda: nn.EnsembleLinear(6, 4, 3, activation="silu"),
    "EnsembleLinear-batch_first": lambda: nn.EnsembleLinear(6, 4, 3, batch_first=True),
    "MultiHeadLinear": lambda: nn.MultiHeadLinear(6, 4, num_heads=5, num_members=3),
    "EnsembleMLP": lambda: nn.EnsembleMLP(6, [8, 8], 4, num_members=3, activation="tanh"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend=AOT)
    for x in (torch.randn(9, 6), torch.randn(9, 3, 6) if layer.batch_first else torch.randn(3, 9, 6)):
        results = []
        for f in (layer, compiled):
            y = f(x)
            grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
            results.append((y, *grads))
        for expected, actual in zip(*results):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(compiled(torch.ones(2, 6), member=1), layer(torch.ones(2, 6), member=1))


def test_inductor():
    """The default compiler, forward and backward through a model that mixes our op with PyTorch's."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), nn.EnsembleMLP(6, [8], 4, num_members=3, activation="gelu"))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(9, 6)
    for f in (model, compiled):
        loss = f(x).log_softmax(-1).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        if f is model:
            expected = (loss, *grads)
    for actual, value in zip((loss, *grads), expected):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-6)


def test_second_derivative_outside_a_compiled_graph():
    """A gradient penalty over a compiled input gradient (torch.compile itself has no double backward)."""
    weight = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 6, dtype=torch.float64)

    def penalty(x, weight):
        gradient = torch.func.grad(lambda x: grouped_linear(x, weight, activation="tanh").sum())(x)
        return gradient.square().sum()

    (expected,) = torch.autograd.grad(penalty(x, weight), weight)
    (actual,) = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend=AOT)(x, weight), weight)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------- torch.export


def test_export_with_any_batch():
    layer = nn.EnsembleMLP(6, [8], 4, num_members=3, activation="gelu")
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (torch.randn(9, 6),), dynamic_shapes=({0: batch},))
    for size in (9, 4, 31):
        x = torch.randn(size, 6)
        assert torch.equal(program.module()(x), layer(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("grouped_linear_fwd" in target for target in targets) == 2


def test_export_saves_and_loads(tmp_path):
    layer = nn.MultiHeadLinear(6, 4, num_heads=5)
    x = torch.randn(9, 6)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "heads.pt2")
    assert torch.equal(torch.export.load(tmp_path / "heads.pt2").module()(x), layer(x))


def test_make_fx_records_one_op_per_direction():
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x, weight):
        y = multihead_linear(x, weight)
        return torch.autograd.grad(y.sum(), weight)[0]

    graph = make_fx(step)(torch.randn(5, 6), torch.randn(2, 4, 6, requires_grad=True)).graph
    ours = [str(node.target) for node in graph.nodes if "effens" in str(node.target)]
    assert ours == ["effens_kernels.grouped_linear_fwd.default", "effens_kernels.grouped_linear_bwd.default"]
