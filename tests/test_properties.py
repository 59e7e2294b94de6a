"""What holds for every backend whatever the values: layouts, determinism, NaN and infinity, memory."""

from __future__ import annotations

import pytest
import torch
from common import ARGUMENTS, derivatives, leaves, name_of, runs
from torch import Tensor

from effens_kernels import grouped_linear
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.testing import DTYPES as ALL_DTYPES
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
DTYPES = (torch.float32, torch.bfloat16)
everywhere = pytest.mark.parametrize(("dtype", "runner"), runs(*DTYPES), indirect=["runner"])


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
@everywhere
def test_gradient_layouts(case, layout, dtype, runner, seed):
    inputs = case.inputs_for(dtype, runner.device, seed)
    check(inputs, GRAD_LAYOUTS[layout](random_grad(case, inputs[0])), runner.backend, case)


EXPANDED = {
    "one_row": lambda x, weight, bias: (x[..., :1, :].expand(x.shape), weight, bias),
    "one_feature": lambda x, weight, bias: (x[..., :1].expand(x.shape), weight, bias),
    "one_member": lambda x, weight, bias: (x, weight[:1].expand(weight.shape), bias[:1].expand(bias.shape)),
    "one_output": lambda x, weight, bias: (x, weight[:, :1].expand(weight.shape), bias[:, :1].expand(bias.shape)),
    "one_input": lambda x, weight, bias: (x, weight[..., :1].expand(weight.shape), bias),
    "one_input_of_transposed": lambda x, weight, bias: (
        x,
        weight.mT.contiguous()[:, :1].expand(weight.mT.shape).mT,
        bias,
    ),
}


@pytest.mark.parametrize("expand", EXPANDED)
@pytest.mark.parametrize("case", [*SMALL, LinearCase(2, 8, 64, 32, activation="tanh")], ids=str)
@everywhere
def test_expanded_inputs(expand, case, dtype, runner, seed):
    """Inputs that are one row, feature or member repeated by stride 0; sizes of odd and of whole vectors."""
    inputs = EXPANDED[expand](*case.inputs_for(dtype, runner.device, seed))
    check(inputs, random_grad(case, inputs[0]), runner.backend, case)


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
    x, grad = (torch.complex(t, t).conj().imag for t in (x, random_grad(case, x)))
    assert x.is_neg()
    check((x, weight, bias), grad, runner.backend, case)


def test_offsets_beyond_32_bits(runner, seed):
    """Members 2^31 elements apart: memory that is never touched costs none."""
    far, dtype = 2**31 + 8, torch.bfloat16
    case = LinearCase(2, 5, 7, 6, activation="silu")
    x, weight, bias = case.inputs_for(dtype, runner.device, seed)
    spread = [torch.empty(far + t.stride(0), dtype=dtype, device=t.device) for t in (x, weight)]
    spread = [room.as_strided(t.shape, (far, *t.stride()[1:])).copy_(t) for room, t in zip(spread, (x, weight))]
    check((*spread, bias), random_grad(case, x), runner.backend, case)


# --------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
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
@everywhere
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_nan_and_infinity_go_where_they_go_in_torch(activation, value, place, dtype, runner, seed):
    """One such element in one place (odd sizes: padding must not spread it): the same positions, in all results.

    Those of torch in float64: its vectorized float32 gelu makes a NaN of infinity, its scalar one does not.
    """
    case = LinearCase(2, 5, 7, 9, activation=activation)
    inputs = [t / 4 for t in case.inputs_for(dtype, runner.device, seed)]  # so that no tanh rounds to 1
    tensors = dict(zip(ARGUMENTS[3], inputs), grad=random_grad(case, inputs[0]))
    tensors[place][..., 1, 3] = value  # in bias: of member 1
    grad = tensors["grad"]
    exact = [t.double() for t in inputs]
    expected = derivatives(reference.grouped_linear, exact, grad.double(), activation=activation)
    actual = derivatives(grouped_linear, inputs, grad, activation=activation, backend=runner.backend)
    for name in expected:
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(test(actual[name]), test(expected[name])), f"{test.__name__} of {name}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "runner"), runs(*ALL_DTYPES), indirect=["runner"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_activations_from_tiny_to_huge(activation, dtype, runner):
    """Each z by itself, through a product with 1: y to a few units of z, slopes to a few units of 1."""
    eps, tiny = torch.finfo(dtype).eps, 8 * torch.finfo(dtype).smallest_normal
    positive = [0.0, tiny, 1e-3, 0.1, 0.6, 0.65, 0.99, 1.01, 2.0, 3.5, 4.1, 6.0, 12.0, 88.0, 90.0, 105.0, 700.0, 3e4]
    chosen = torch.tensor([sign * value for value in positive for sign in (1, -1)], dtype=torch.float64)
    z = torch.cat((chosen, 3 * torch.randn(100, dtype=torch.float64))).to(runner.device, dtype)
    x, one, grad = z[:, None], torch.ones_like(z[:1])[None, None], torch.ones_like(z)[None, :, None]
    exact = derivatives(
        reference.grouped_linear, (x.double(), one.double(), None), grad.double(), activation=activation
    )
    theirs = derivatives(reference.grouped_linear, (x, one, None), grad, activation=activation)
    ours = derivatives(grouped_linear, (x, one, None), grad, activation=activation, backend=runner.backend)
    for name, unit in (("y", z.double().abs()), ("x", torch.ones_like(z, dtype=torch.float64))):
        error, their_error = ((t[name].double() - exact[name]).abs().flatten() for t in (ours, theirs))
        allowed = 2 * their_error + 4 * eps * unit
        wrong = ~(error <= allowed)
        assert not wrong.any(), f"{name} at z = {z[wrong].tolist()}: errors {error[wrong].tolist()}"


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
