"""ensemble_mlp equals the float64 oracle, forward and backward, and bit for bit the chain of grouped_linear.

relu's gradients are compared with the oracle in float64 alone: elsewhere a pre-activation within rounding of 0 may
change its sign, and with it the whole gradient of a row.  In the other dtypes they are those of grouped_linear.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from common import RUNNERS, Runner, name_of
from mlp_cases import Inputs, MLPCase, chain, gradients
from torch import Tensor

from effens_kernels import ensemble_mlp
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.ensemble_mlp import reference
from effens_kernels.testing import DTYPES, assert_accurate

WIDE = (torch.float32, torch.float64)
FULL_ENGINES = [runner for runner in RUNNERS if not runner.interpreted]

# Enough elements for the largest error of the composition to be a fair measure in 16 bits.
CASES = [
    MLPCase(3, 33, (17, 70), None, "gelu"),
    MLPCase(3, 17, (33, 64, 17), "gelu"),
    MLPCase(2, 70, (17, 33, 64, 33), "tanh", shared=True),
    MLPCase(2, 33, (64, 70, 33, 123, 17), "silu"),
    MLPCase(1, 33, (64, 33, 17), "tanh", "tanh"),
    MLPCase(1, 64, (33, 17, 64), "silu", "silu", shared=True),
    MLPCase(3, 17, (64, 64, 64, 64), None, None, bias="none"),
    MLPCase(2, 33, (33, 64, 70, 17), "gelu", "relu", bias="some"),
    *(MLPCase(2, 33, (17, 33, 33), a, b, shared=a == "relu") for a in ACTIVATIONS for b in ACTIVATIONS),
    *(
        MLPCase(3, 33, (17, 33, 64, 33), "gelu", shared=shared, shared_layers=layers)
        for shared in (False, True)
        for layers in ((0,), (0, 1), (1,), (0, 2), (2,), (0, 1, 2))
    ),
    *(
        MLPCase(3, 33, (17, 33, 17), "tanh", shared=shared, x_layout=layout, weight_layout=other)
        for layout, other in (("transposed", "offset"), ("inner", "contiguous"), ("stepped", "inner"))
        for shared in (False, True)
    ),
    MLPCase(3, 33, (17, 33, 17), "relu", weight_layout="stepped"),
    MLPCase(3, 33, (17, 33, 17), "gelu", weight_layout="transposed", shared_layers=(1,)),
]
# Few numbers, of which the composition may round each by luck better than its error on average.
SMALL_CASES = [
    MLPCase(1, 1, (1, 1), "relu"),
    MLPCase(2, 1, (1, 3, 1), "tanh"),
    MLPCase(3, 3, (3, 1, 17, 3), "tanh", shared=True),
    MLPCase(1, 3, (17, 3), None, shared=True, bias="none"),
    MLPCase(2, 7, (123, 1, 123), "silu"),
    MLPCase(7, 2, (3, 3, 2), "relu"),
]
# Rows in several chunks, layers beyond one cache block, more than a member's share of the cache.
LARGE_CASES = [
    MLPCase(2, 1500, (100, 100, 100), "gelu"),
    MLPCase(1, 5000, (17, 64, 64, 3), "tanh", shared=True),
    MLPCase(3, 130, (8, 1100, 4), "silu", "tanh"),
    MLPCase(2, 1100, (70, 123, 64), "gelu", shared=True, shared_layers=(0,)),
    MLPCase(3, 1100, (33, 123, 123, 5), "tanh", shared_layers=(1,)),
]
EMPTY_CASES = [
    MLPCase(members, batch, widths, activation, "tanh" if activation else None, shared, layers)
    for members, batch, widths in [
        (0, 4, (3, 5, 2)),
        (2, 0, (3, 5, 2)),
        (2, 4, (0, 5, 2)),
        (2, 4, (3, 0, 2)),
        (2, 4, (3, 5, 0)),
        (0, 0, (0, 0, 0)),
    ]
    for activation, shared, layers in [
        ("relu", False, ()),
        ("gelu", True, ()),
        (None, False, (1,)),
        ("silu", True, (0,)),
    ]
]


def affordable(runner: Runner, case: MLPCase, dtype: torch.dtype) -> bool:
    """Triton's interpreter takes milliseconds per tile, and its layers are grouped_linear's, which are tested there."""
    if dtype not in runner.dtypes("ensemble_mlp"):
        return False
    work = case.members * case.batch * max(case.widths)
    return not runner.interpreted or (dtype == torch.float32 and work <= 400)


def calls(cases: list[MLPCase], dtypes: tuple[torch.dtype, ...]) -> list:
    return [
        pytest.param(case, dtype, runner, id=f"{case}-{name_of(dtype)}-{runner}")
        for case in cases
        for dtype in dtypes
        for runner in RUNNERS
        if affordable(runner, case, dtype)
    ]


@lru_cache(maxsize=4)  # runners of one call follow each other
def sample(case: MLPCase, dtype: torch.dtype, device: str, seed: int) -> tuple[Inputs, Tensor, dict, dict]:
    inputs = case.inputs_for(dtype, device, seed)
    grad = case.grad_for(inputs.x, seed + 1)
    exact = gradients(reference.ensemble_mlp, inputs.map(Tensor.double), grad.double(), **case.options)
    return inputs, grad, exact, gradients(reference.ensemble_mlp, inputs, grad, **case.options)


def check(case: MLPCase, dtype: torch.dtype, runner: Runner, seed: int, slack: int = 1) -> None:
    """The rule of tolerance, for `slack` times as many terms; float64 needs some, since the oracle rounds as we do."""
    slack = 100 if dtype == torch.float64 else slack
    inputs, grad, exact, composition = sample(case, dtype, runner.device, seed)
    actual = gradients(ensemble_mlp, inputs, grad, **case.options, backend=runner.backend)
    kinked = "relu" in (case.activation, case.out_activation)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        if name == "y" or not kinked or dtype == torch.float64:
            assert_accurate(value, exact[name], composition[name], name, slack * case.terms(name))


@pytest.mark.parametrize(("case", "dtype", "runner"), calls(CASES, DTYPES), indirect=["runner"])
def test_values_and_gradients(case, dtype, runner, session_seed):
    check(case, dtype, runner, session_seed)


@pytest.mark.parametrize(("case", "dtype", "runner"), calls(SMALL_CASES, WIDE), indirect=["runner"])
def test_values_and_gradients_of_few_numbers(case, dtype, runner, session_seed):
    check(case, dtype, runner, session_seed, slack=100)


@pytest.mark.parametrize(("case", "dtype", "runner"), calls(LARGE_CASES, DTYPES[:3]), indirect=["runner"])
def test_values_and_gradients_beyond_one_cache_block(case, dtype, runner, session_seed):
    check(case, dtype, runner, session_seed)


@pytest.mark.parametrize(("case", "dtype", "runner"), calls(EMPTY_CASES, WIDE), indirect=["runner"])
def test_empty_sizes(case, dtype, runner, session_seed):
    """As the composition: empty results, activated biases, and sums over nothing that are written zeros."""
    inputs, grad, _, composition = sample(case, dtype, runner.device, session_seed)
    actual = gradients(ensemble_mlp, inputs, grad, **case.options, backend=runner.backend)
    for name, value in composition.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- the chain of grouped_linear


def assert_same_as_chain(case: MLPCase, dtype: torch.dtype, seed: int) -> None:
    inputs = case.inputs_for(dtype, seed=seed)
    grad = case.grad_for(inputs.x, seed + 1)
    actual = gradients(ensemble_mlp, inputs, grad, **case.options, backend="cpu")
    for name, value in gradients(chain, inputs, grad, **case.options).items():
        if name.startswith("biases"):  # the same sums in an order of their own
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4 * (1 + value.abs().max().item()))
        else:
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
def test_gradients_are_those_of_the_chain(activation, shared, dtype, isa, seed):
    for sizes in [(1, 1, (1, 1)), (3, 17, (33, 64)), (3, 64, (17, 33, 3)), (2, 70, (64, 64, 64, 64, 123))]:
        for out_activation in (None, "relu"):
            assert_same_as_chain(MLPCase(*sizes, activation, out_activation, shared), dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        MLPCase(2, 1500, (100, 100, 100)),
        MLPCase(1, 5000, (17, 64, 64, 3), shared=True),
        MLPCase(2, 130, (8, 1100, 64, 4), out_activation="relu"),
    ],
    ids=str,
)
def test_gradients_of_large_calls_are_those_of_the_chain(case, dtype, isa, seed):
    assert_same_as_chain(case, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", [*CASES, *SMALL_CASES, *LARGE_CASES], ids=str)
def test_the_same_bits_on_every_route(case, dtype, isa, seed):
    """The chain, with gradients to come, and without, where hidden values are never written to memory."""
    inputs = case.inputs_for(dtype, seed=seed)

    def call(inputs):
        return ensemble_mlp(inputs.x, inputs.weights, inputs.biases, **case.options, backend="cpu")

    expected = chain(inputs.x, inputs.weights, inputs.biases, **case.options)
    trained = inputs.leaves()
    assert torch.equal(call(inputs), expected)
    assert torch.equal(call(trained).detach(), expected)
    with torch.no_grad():
        assert torch.equal(call(trained), expected)
    with torch.inference_mode():
        assert torch.equal(call(trained), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        *LARGE_CASES,
        MLPCase(10, 256, (8, 64, 64, 64, 20), shared=True),
        MLPCase(10, 256, (8, 64, 64, 20), shared_layers=(0, 1)),
        MLPCase(5, 140, (8, 64, 64, 20), "gelu", "tanh", shared_layers=(1, 2)),
        MLPCase(7, 90, (33, 40), out_activation="relu", shared=True),
        MLPCase(1, 700, (70, 64, 33), "relu", "relu"),
    ],
    ids=str,
)
def test_any_number_of_threads(case, dtype, isa, threads, seed):
    """The same bits, run after run, for any number; but that gradients of shared layers are summed by thread."""
    inputs = case.inputs_for(dtype, seed=seed)
    grad = case.grad_for(inputs.x, seed + 1)
    summed = {f"{kind}[{layer}]" for layer in case.shared_layers for kind in ("weights", "biases")}
    first = None
    for number in (1, 2, 3, 4):
        threads(number)
        results = gradients(ensemble_mlp, inputs, grad, **case.options, backend="cpu")
        first = first or results
        again = gradients(ensemble_mlp, inputs, grad, **case.options, backend="cpu")
        for name, value in results.items():
            assert torch.equal(again[name], value), name
            if name in summed:
                scale = first[name].abs().max().item()
                torch.testing.assert_close(value, first[name], rtol=0, atol=32 * torch.finfo(dtype).eps * scale)
            else:
                assert torch.equal(first[name], value), name


# ----------------------------------------------------------------------------------------------------------- strides

GRADS = {
    "batch_first": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "inner": lambda g: g.mT.contiguous().mT,
    "stepped": lambda g: torch.stack((g, g), -1).flatten(-2)[..., 1::2],
    "one_value": lambda g: g[:1, :1, :1].expand(g.shape),
    "one_row": lambda g: g[:, :1].expand(g.shape),
    "flipped_sign": lambda g: torch.complex(g, -g).conj().imag,
}


@pytest.mark.parametrize("layout", GRADS)
@pytest.mark.parametrize("out_activation", [None, "tanh", "gelu"])
@pytest.mark.parametrize("shared_layers", [(), (0,), (1,)], ids=["own", "trunk_shared", "head_shared"])
def test_strides_of_the_incoming_gradient(layout, out_activation, shared_layers, isa, seed):
    case = MLPCase(3, 9, (21, 16, 13), "tanh", out_activation, shared_layers=shared_layers)
    inputs = case.inputs_for(torch.float64, seed=seed)
    grad = GRADS[layout](case.grad_for(inputs.x, seed + 1))
    expected = gradients(reference.ensemble_mlp, inputs, grad, **case.options)
    for name, value in gradients(ensemble_mlp, inputs, grad, **case.options, backend="cpu").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)


EXPANDED = {
    "x_one_row": lambda i: Inputs(i.x[..., :1, :].expand(i.x.shape), i.weights, i.biases),
    "x_one_feature": lambda i: Inputs(i.x[..., :1].expand(i.x.shape), i.weights, i.biases),
    "x_one_member": lambda i: Inputs(i.x[:1].expand(i.x.shape), i.weights, i.biases),
    "weights_one_member": lambda i: Inputs(i.x, [w[:1].expand(w.shape) for w in i.weights], i.biases),
    "weights_one_output": lambda i: Inputs(i.x, [w[:, :1].expand(w.shape) for w in i.weights], i.biases),
    "biases_one_value": lambda i: Inputs(i.x, i.weights, [b[:, :1].expand(b.shape) for b in i.biases]),
    "biases_by_columns": lambda i: Inputs(i.x, i.weights, [b.mT.contiguous().mT for b in i.biases]),
    "flipped_signs": lambda i: i.map(lambda t: torch.complex(t, t).conj().imag),
}


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
def test_views(name, shared, isa, seed):
    if shared and name == "x_one_member":
        return
    case = MLPCase(3, 9, (21, 16, 13), "tanh", "gelu", shared=shared)
    inputs = EXPANDED[name](case.inputs_for(torch.float64, seed=seed))
    grad = case.grad_for(inputs.x, seed + 1)
    expected = gradients(reference.ensemble_mlp, inputs, grad, **case.options)
    for argument, value in gradients(ensemble_mlp, inputs, grad, **case.options, backend="cpu").items():
        torch.testing.assert_close(value, expected[argument], rtol=1e-11, atol=1e-11)


def test_a_batch_first_view_costs_no_copy(isa, seed):
    """[B, E, I] in memory, [E, B, I] in shape: the gradient lies as x does."""
    x = torch.randn(9, 3, 21).transpose(0, 1).requires_grad_()
    weights = MLPCase(3, 9, (21, 16, 13)).inputs_for(seed=seed).leaves().weights
    (grad,) = torch.autograd.grad(ensemble_mlp(x, weights, backend="cpu").sum(), x)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_values_that_are_not_finite_stay_in_their_row_and_member(value, isa, seed):
    inputs = MLPCase(3, 70, (17, 33, 64, 5)).inputs_for(seed=seed)
    expected = ensemble_mlp(inputs.x, inputs.weights, inputs.biases, backend="cpu")
    inputs.x[1, 37, 2] = value
    actual = ensemble_mlp(inputs.x, inputs.weights, inputs.biases, backend="cpu")
    assert not actual[1, 37].isfinite().all()
    expected[1, 37] = actual[1, 37] = 0
    assert torch.equal(actual, expected)


def test_defaults(seed):
    """relu between the layers, none after the last, no biases; a tuple is as good as a list."""
    inputs = MLPCase(3, 9, (21, 16, 13), bias="none").inputs_for(torch.float64, seed=seed)
    expected = torch.relu(inputs.x @ inputs.weights[0].mT) @ inputs.weights[1].mT
    torch.testing.assert_close(ensemble_mlp(inputs.x, inputs.weights), expected, rtol=1e-12, atol=1e-12)
    actual = ensemble_mlp(inputs.x, tuple(inputs.weights), (None, None), backend="cpu")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", ["all", "some"])
@pytest.mark.parametrize("shared_layers", [(), (0,), (0, 1)], ids=str)
def test_heads_are_outputs_side_by_side(shared_layers, bias, runner, seed):
    """A last layer [E, H, O, I], forward and backward."""
    heads, outputs = 4, 3
    case = MLPCase(3, 5, (6, 7, heads * outputs), "gelu", "tanh", bias=bias, shared_layers=shared_layers)
    inputs = case.inputs_for(torch.float32, runner.device, seed)
    grad = case.grad_for(inputs.x, seed + 1)
    expected = gradients(ensemble_mlp, inputs, grad, **case.options, backend=runner.backend)
    inputs.weights[-1] = inputs.weights[-1].unflatten(1, (heads, outputs))
    if inputs.biases[-1] is not None:
        inputs.biases[-1] = inputs.biases[-1].unflatten(1, (heads, outputs))
    grad = grad.unflatten(-1, (heads, outputs))
    actual = gradients(ensemble_mlp, inputs, grad, **case.options, backend=runner.backend)
    for name, value in actual.items():
        of_heads = name in ("y", "weights[1]", "biases[1]")
        assert value.dim() == expected[name].dim() + of_heads
        torch.testing.assert_close(value.reshape(expected[name].shape), expected[name], rtol=0, atol=0)
