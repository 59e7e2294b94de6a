"""Autocast, checkpointing, dispatch modes and subclasses: everything that stands between a model and its ops."""

from __future__ import annotations

import pytest
import torch
from common import derivatives, leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from effens_kernels import grouped_linear, multihead_linear, nn
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.testing import LinearCase

activations = pytest.mark.parametrize("activation", ACTIVATIONS)


# -------------------------------------------------------------------------------------------------------- autocast


@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_autocast_equals_explicit_casts(activation, dtype, backend, seed):
    """Output in autocast's dtype; gradients in the dtype of the parameters."""
    inputs = LinearCase(3, 17, 30, 10).inputs_for(seed=seed)
    grad = torch.randn(3, 17, 10).to(dtype)

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype):
            return grouped_linear(*inputs, activation=activation, backend=backend)

    def cast(*inputs):
        return grouped_linear(*(t.to(dtype) for t in inputs), activation=activation, backend=backend)

    actual, expected = (derivatives(call, inputs, grad) for call in (under_autocast, cast))
    for name in expected:
        assert actual[name].dtype == (dtype if name == "y" else torch.float32)
        assert torch.equal(actual[name], expected[name]), name


def test_autocast_of_layers_and_heads():
    x = torch.randn(6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.EnsembleMLP(5, [4], 3, num_members=2)(x).dtype == torch.bfloat16
        assert nn.MultiHeadLinear(5, 4, num_heads=3)(x).dtype == torch.bfloat16
        assert nn.EnsembleLinear(5, 4, 3)(x, member=1).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert nn.EnsembleLinear(5, 4, 3)(x).dtype == torch.float32


def test_autocast_leaves_float64_alone(seed):
    """As torch.nn.functional.linear."""
    x, weight, bias = LinearCase(3, 4, 5, 6).inputs_for(torch.float64, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(x[0], weight[0], bias[0]).dtype == torch.float64
        assert grouped_linear(x, weight, bias).dtype == torch.float64


def test_autocast_mixes_dtypes(seed):
    """Activations that a layer before made bfloat16, parameters in float32."""
    x, weight, bias = LinearCase(3, 4, 5, 6).inputs_for(seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        actual = grouped_linear(x.bfloat16(), weight, bias)
    assert torch.equal(actual, grouped_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_autocast_compiles(seed):
    inputs = LinearCase(3, 4, 5, 6).inputs_for(seed=seed)

    def call(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return grouped_linear(*inputs, activation="gelu")

    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))


# ----------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@activations
def test_checkpoint(use_reentrant, activation, seed):
    def call(*inputs):
        return grouped_linear(*inputs, activation=activation, backend="cpu").sin()

    inputs = LinearCase(3, 17, 30, 10).inputs_for(seed=seed)
    grad = torch.randn(3, 17, 10)
    expected = derivatives(call, inputs, grad)
    actual = leaves(inputs)
    y = checkpoint(call, *actual, use_reentrant=use_reentrant)
    y.backward(grad)
    assert torch.equal(y, expected["y"])
    assert all(torch.equal(t.grad, expected[name]) for name, t in zip(("x", "weight", "bias"), actual))


# ------------------------------------------------------------------------------------------------- modes, subclasses


def test_flop_counter_runs_and_changes_nothing(seed):
    inputs = leaves(LinearCase(3, 17, 30, 10).inputs_for(seed=seed))
    expected = torch.autograd.grad(grouped_linear(*inputs, activation="gelu").sum(), inputs)
    with FlopCounterMode(display=False):
        actual = torch.autograd.grad(grouped_linear(*inputs, activation="gelu").sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_dispatch_mode_sees_one_op_per_direction(seed):
    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = leaves(LinearCase(3, 4, 5, 6).inputs_for(seed=seed))
    with Log() as log:
        y = grouped_linear(*inputs, activation="relu")
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    ours = [name for name in log.names if name.startswith("effens_kernels.")]
    assert ours == ["effens_kernels.grouped_linear_fwd.default", "effens_kernels.grouped_linear_bwd.default"]


def test_tensor_subclasses_keep_their_type(seed):
    class Named(torch.Tensor):
        pass

    x, weight, bias = LinearCase(3, 4, 5, 6).inputs_for(seed=seed)
    y = grouped_linear(x.as_subclass(Named), weight, bias)
    assert type(y) is Named
    assert torch.equal(y.as_subclass(torch.Tensor), grouped_linear(x, weight, bias))


def test_anomaly_detection_and_hooks(seed):
    inputs = leaves(LinearCase(3, 4, 5, 6).inputs_for(seed=seed))
    seen = []
    with torch.autograd.detect_anomaly(check_nan=True):
        y = grouped_linear(*inputs, activation="silu")
        y.register_hook(seen.append)
        y.backward(torch.ones_like(y))
    assert torch.equal(seen[0], torch.ones_like(y))


def test_multihead_linear_under_no_grad_and_autocast(seed):
    x, weight, bias = LinearCase(3, 4, 5, 6, heads=2).inputs_for(seed=seed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = multihead_linear(x, weight.requires_grad_(), bias)
    assert not actual.requires_grad
    assert torch.equal(actual, multihead_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
