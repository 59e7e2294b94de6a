"""What holds for every backend whatever the values: layouts, determinism, NaN and infinity, memory."""

from __future__ import annotations

import pytest
import torch
from common import NAMES, derivatives, leaves, name_of
from torch import Tensor

from effens_kernels import grouped_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.testing import LinearCase, assert_accurate

SMALL = [
    LinearCase(3, 9, 21, 13, activation="relu"),
    LinearCase(3, 9, 21, 13, shared=True, activation="gelu"),
]
# Several row, column and reduction blocks, and enough work for two threads.
LARGE = [
    LinearCase(3, 260, 420, 150, activation="gelu"),
    LinearCase(3, 260, 420, 150, shared=True, activation="relu"),
    LinearCase(1, 1300, 65, 130),
]
by_name = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


def random_grad(case: LinearCase, like: Tensor) -> Tensor:
    return torch.randn(case.members, case.batch, case.outputs, dtype=torch.float64).to(like)


def check(inputs: tuple[Tensor | None, ...], grad: Tensor, backend: str, case: LinearCase) -> None:
    wide = [None if t is None else t.double() for t in inputs]
    exact = derivatives(reference.grouped_linear, wide, grad.double(), activation=case.activation)
    composition = derivatives(reference.grouped_linear, inputs, grad, activation=case.activation)
    actual = derivatives(grouped_linear, inputs, grad, activation=case.activation, backend=backend)
    for name in exact:
        assert_accurate(actual[name], exact[name], composition[name], name, case.terms()[name])


# ------------------------------------------------------------------------------------------------------- layouts

GRAD_LAYOUTS = {
    "batch_first": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "inner": lambda g: g.mT.contiguous().mT,
    "stepped": lambda g: torch.stack((g, g), -1).flatten(-2)[..., 1::2],
    "one_value": lambda g: g[:1, :1, :1].expand(g.shape),  # what y.sum().backward() sends
    "one_row": lambda g: g[:, :1].expand(g.shape),
    "one_member": lambda g: g[:1].expand(g.shape),
}


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("case", SMALL, ids=str)
@by_name
def test_gradient_layouts(case, layout, dtype, runner, seed):
    inputs = case.inputs_for(dtype, runner.device, seed)
    check(inputs, GRAD_LAYOUTS[layout](random_grad(case, inputs[0])), runner.backend, case)


@pytest.mark.parametrize("case", SMALL, ids=str)
@by_name
def test_expanded_inputs(case, dtype, runner, seed):
    """Rows, weights and biases that are one tensor for all members, rows or features, by stride 0."""
    x, weight, bias = case.inputs_for(dtype, runner.device, seed)
    x = x[..., :1, :].expand(x.shape)
    weight = weight[:1, :, :1].expand(weight.shape)
    bias = bias[:1].expand(bias.shape)
    check((x, weight, bias), random_grad(case, x), runner.backend, case)


def test_member_stride_zero_equals_shared_rows(runner, seed):
    case = LinearCase(4, 7, 19, 11, shared=True, activation="tanh")
    x, weight, bias = case.inputs_for(torch.float32, runner.device, seed)
    check((x.expand(4, *x.shape), weight, bias), random_grad(case, x), runner.backend, case)


def test_transposed_bias(runner, seed):
    case = LinearCase(5, 4, 6, 9)
    x, weight, bias = case.inputs_for(torch.float32, runner.device, seed)
    check((x, weight, bias.mT.contiguous().mT), random_grad(case, x), runner.backend, case)


def test_flipped_sign_views(runner, seed):
    """The imaginary part of a conjugate is a real tensor whose memory holds the opposite sign."""
    case = LinearCase(2, 5, 8, 7)
    x, weight, bias = case.inputs_for(torch.float32, runner.device, seed)
    x, weight = (torch.complex(t, t).conj().imag for t in (x, weight))
    assert x.is_neg()
    check((x, weight, bias), random_grad(case, x), runner.backend, case)


def test_offsets_beyond_32_bits(runner, seed):
    """Members 2^31 elements apart: memory that is never touched costs none."""
    if runner.interpreted or runner.device != "cpu":
        far, dtype = 2**31 + 8, torch.bfloat16
    else:
        far, dtype = 2**31 + 8, torch.bfloat16
    case = LinearCase(2, 5, 7, 6, activation="silu")
    x, weight, bias = case.inputs_for(dtype, runner.device, seed)
    spread = [torch.empty(far + t.stride(0), dtype=dtype, device=t.device) for t in (x, weight)]
    spread = [room.as_strided(t.shape, (far, *t.stride()[1:])).copy_(t) for room, t in zip(spread, (x, weight))]
    check((*spread, bias), random_grad(case, x), runner.backend, case)


# --------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("case", LARGE, ids=str)
@by_name
def test_same_bits_for_any_number_of_threads(case, dtype, isa, threads, seed):
    inputs = case.inputs_for(dtype, seed=seed)
    grad = random_grad(case, inputs[0])
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(derivatives(grouped_linear, inputs, grad, **case.options(), backend="cpu"))
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_same_bits_every_time(case, runner, seed):
    inputs = case.inputs_for(torch.float32, runner.device, seed)
    grad = random_grad(case, inputs[0])
    first, second = (
        derivatives(grouped_linear, inputs, grad, **case.options(), backend=runner.backend) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_rows_do_not_depend_on_the_batch_they_come_in(isa, seed):
    """One member's results depend neither on the other members nor, for the C++ engine, on the other rows."""
    case = LinearCase(4, 70, 100, 50, activation="gelu")
    x, weight, bias = case.inputs_for(torch.float32, seed=seed)
    whole = grouped_linear(x, weight, bias, activation="gelu", backend="cpu")
    member = grouped_linear(x[2:3], weight[2:3], bias[2:3], activation="gelu", backend="cpu")
    rows = grouped_linear(x[:, 3:5], weight, bias, activation="gelu", backend="cpu")
    assert torch.equal(whole[2:3], member)
    assert torch.equal(whole[:, 3:5], rows)


# ---------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("place", ["x", "weight", "bias", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@by_name
def test_nan_and_infinity_go_where_they_go_in_torch(activation, value, place, dtype, runner, seed):
    """One such element in one place (odd sizes: padding must not spread it): the same positions, in all results."""
    if runner.interpreted and (dtype != torch.float32 or place == "weight"):
        return  # too slow for all combinations; the device code is the same for each
    case = LinearCase(2, 5, 7, 9, activation=activation)
    inputs = case.inputs_for(dtype, runner.device, seed)
    tensors = dict(zip(NAMES, inputs), grad=random_grad(case, inputs[0]))
    tensors[place][..., 1, 3] = value  # in bias: of member 1
    grad = tensors["grad"]
    expected = derivatives(reference.grouped_linear, inputs, grad, activation=activation)
    actual = derivatives(grouped_linear, inputs, grad, activation=activation, backend=runner.backend)
    assert any(not t.isfinite().all() for t in expected.values()) or activation == "relu" or place != "grad"
    for name in expected:
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(test(actual[name]), test(expected[name])), (name, test)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=name_of)
def test_saturation(activation, dtype, runner):
    """Activations and slopes at large, tiny and zero pre-activations, through an identity product."""
    if dtype not in runner.dtypes("grouped_linear") or (runner.interpreted and dtype != torch.float32):
        return
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, tiny, -tiny, 1e-3, -1e-3, 0.7, -0.7, 1.0, -1.0, 3.5, -3.5, 6.0, -6.0, 12.0, -12.0, 90.0, -90.0]
    values += [105.0, -105.0, 700.0, -700.0, 3e4, -3e4]
    x = torch.tensor(values, dtype=dtype, device=runner.device)[:, None]
    weight = torch.ones(1, 1, 1, dtype=dtype, device=runner.device)
    grad = torch.ones(1, len(values), 1, dtype=dtype, device=runner.device)
    exact = derivatives(reference.grouped_linear, (x.double(), weight.double(), None), grad.double(),
                        activation=activation)
    composition = derivatives(reference.grouped_linear, (x, weight, None), grad, activation=activation)
    actual = derivatives(grouped_linear, (x, weight, None), grad, activation=activation, backend=runner.backend)
    for n, value in enumerate(values):  # one by one: each at its own scale
        assert_accurate(actual["y"][0, n], exact["y"][0, n], composition["y"][0, n], f"act({value})", 16)
        assert_accurate(actual["x"][n], exact["x"][n], composition["x"][n], f"slope at {value}", 16)


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_are_new_memory_and_inputs_stay(activation, runner, seed):
    case = LinearCase(1, 4, 4, 4, activation=activation)
    inputs = leaves(case.inputs_for(torch.float32, runner.device, seed))
    before = [t.detach().clone() for t in inputs]
    y = grouped_linear(*inputs, activation=activation, backend=runner.backend)
    grad = torch.randn_like(y)
    grad_before = grad.clone()
    gradients = torch.autograd.grad(y, inputs, grad)
    storages = [t.untyped_storage().data_ptr() for t in (*inputs, grad, y, *gradients)]
    assert len(set(storages)) == len(storages)
    assert all(torch.equal(t, b) for t, b in zip((*inputs, grad), (*before, grad_before)))


def test_nothing_is_written_outside_the_results(isa, seed):
    """Results in the middle of poisoned memory: the C++ engine's writes stay inside them (its own test has more)."""
    case = LinearCase(3, 13, 17, 19)
    x, weight, bias = case.inputs_for(torch.float32, seed=seed)
    y = grouped_linear(x, weight, bias, backend="cpu")
    assert y.untyped_storage().nbytes() == y.numel() * 4
    assert y.is_contiguous()
