"""mixture_linear's own kernels on the CPU: weights mixed block by block and multiplied where they are."""

from __future__ import annotations

import pytest
import torch
from common import RUNNERS, derivatives, sample

from effens_kernels import _dispatch, _native, mixture_linear
from effens_kernels.ops.mixture_linear import reference
from effens_kernels.testing import DTYPES, MixtureCase, assert_accurate

CASES = [
    MixtureCase(1, 1, 1, 1, templates=1),
    MixtureCase(3, 5, 7, 9, templates=2),
    MixtureCase(11, 3, 17, 130, templates=4, activation="relu"),  # groups of members
    MixtureCase(5, 9, 300, 70, templates=3, activation="gelu"),
    MixtureCase(8, 1, 96, 96, templates=17),
    MixtureCase(40, 4, 260, 250, templates=5),  # several blocks of each kind
    MixtureCase(3, 150, 210, 130, templates=4, activation="silu"),  # x is not read where it is
    MixtureCase(4, 16, 64, 64, shared=True, templates=4),
    MixtureCase(19, 33, 101, 203, shared=True, templates=6, activation="relu"),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cpu = pytest.mark.parametrize("runner", [r for r in RUNNERS if r.backend == "cpu"], indirect=True, ids=str)


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    monkeypatch.setattr(_dispatch, "mixture_route", lambda *_: "blocks")


def check(case, dtype, seed):
    inputs, grad, exact, composition = sample("mixture_linear", case, dtype, "cpu", seed)
    actual = derivatives(mixture_linear, inputs, grad, **case.options(), backend="cpu")
    for name, value in actual.items():
        assert_accurate(value, exact[name], composition[name], name, case.terms()[name])


@cpu
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, runner, seed):
    check(case, dtype, seed)


@dtypes
@pytest.mark.parametrize("case", CASES[3:6], ids=str)
def test_weights_mixed_whole_for_dx(case, dtype, seed, monkeypatch):
    monkeypatch.setattr(_dispatch, "mixes_whole_for_inputs", lambda _: True)
    check(case, dtype, seed)


@pytest.mark.parametrize("layout", ["turned", "rows_apart", "columns_cut", "interleaved", "expanded"])
def test_any_strides(layout, seed):
    torch.manual_seed(seed)
    x = torch.randn(30, 6, 40).permute(1, 2, 0)[:, ::2]
    coefficients, bias = torch.randn(3, 12).t()[::2], torch.randn(50, 6).t()
    templates = {
        "turned": torch.randn(30, 3, 50).permute(1, 2, 0),
        "rows_apart": torch.randn(3, 100, 30)[:, ::2],
        "columns_cut": torch.randn(3, 50, 60)[..., :30],
        "interleaved": torch.randn(50, 3, 30).transpose(0, 1),
        "expanded": torch.randn(1, 50, 30).expand(3, -1, -1),
    }[layout]
    inputs = x, coefficients, templates, bias
    grad = torch.randn(50, 6, 20).permute(1, 2, 0)
    actual = derivatives(mixture_linear, inputs, grad, activation="tanh", backend="cpu")
    exact = derivatives(reference.mixture_linear, [t.double() for t in inputs], grad.double(), activation="tanh")
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_each_gradient_alone(needed, activation, seed):
    case = CASES[3]
    inputs = case.inputs_for(torch.float64, seed=seed)

    def gradients(backend):
        leaves = [t.clone().requires_grad_(n in needed) for n, t in enumerate(inputs)]
        mixture_linear(*leaves, activation=activation, backend=backend).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for actual, expected in zip(gradients("cpu"), gradients("reference")):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


def arguments(**changed):
    good = {
        "x": torch.zeros(4, 3, 5),
        "coefficients": torch.zeros(4, 2),
        "templates": torch.zeros(2, 6, 5),
        "bias": torch.zeros(4, 6),
    }
    return list({**good, **changed}.values())


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(4, 3, 6)},
        {"x": torch.zeros(3, 3, 5)},
        {"x": torch.zeros(5)},
        {"x": torch.zeros(4, 3, 5).double()},
        {"coefficients": torch.zeros(4, 3)},
        {"coefficients": torch.zeros(4, 2).double()},
        {"templates": torch.zeros(2, 30)},
        {"coefficients": torch.zeros(4, 0), "templates": torch.zeros(0, 6, 5)},
        {"bias": torch.zeros(4, 5)},
        {"bias": torch.zeros(6)},
    ],
    ids=lambda changed: "-".join(f"{name}{list(t.shape)}{t.dtype}" for name, t in changed.items()),
)
def test_direct_calls_of_the_schema_are_checked(changed):
    with pytest.raises(RuntimeError, match="mixture_linear_fwd"):
        _native.ops.mixture_linear_fwd(*arguments(**changed), 0, False)
    if "bias" in changed:
        return
    x, coefficients, templates, _ = arguments(**changed)
    with pytest.raises(RuntimeError, match="mixture_linear_bwd"):
        _native.ops.mixture_linear_bwd(
            torch.zeros(4, 3, 6), x, coefficients, templates, torch.empty(0), 0, True, True, True, True
        )


def test_gradients_that_do_not_fit():
    x, coefficients, templates, _ = arguments()
    for grad, saved, activation in (
        (torch.zeros(4, 3, 5), torch.empty(0), 0),
        (torch.zeros(4, 3, 6), torch.zeros(4, 3, 5), 1),
        (torch.zeros(4, 3, 6), torch.zeros(4, 3, 6), 9),
    ):
        with pytest.raises(RuntimeError, match="mixture_linear_bwd"):
            _native.ops.mixture_linear_bwd(grad, x, coefficients, templates, saved, activation, True, True, True, True)
    with pytest.raises(RuntimeError, match="the gradient of a shared x"):
        _native.ops.mixture_linear_bwd(
            torch.zeros(4, 3, 6), x[0], coefficients, templates, torch.empty(0), 0, True, True, True, True
        )
