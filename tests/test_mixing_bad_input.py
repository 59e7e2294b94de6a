"""Bad input of mix_templates and mixture_linear: errors that name op, argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from bad_input import assert_refused, f, forbid

from effens_kernels import _native, mix_templates, mixture_linear
from effens_kernels.ops.mix_templates import autograd as mixing
from effens_kernels.ops.mix_templates import reference as mixing_reference
from effens_kernels.ops.mixture_linear import reference
from effens_kernels.ops.mixture_linear.autograd import FORM

E, B, I, O, T = 3, 5, 7, 4, 2

GOOD = {
    mix_templates: {"coefficients": f(E, T), "templates": f(T, O, I)},
    mixture_linear: {"x": f(B, I), "coefficients": f(E, T), "templates": f(T, O, I), "bias": f(O)},
}
# name: (what is changed, error, argument that is named, words that must be there)
BOTH = {
    "coefficients_list": ({"coefficients": [[1.0]]}, TypeError, "coefficients", "torch.Tensor"),
    "templates_none": ({"templates": None}, TypeError, "templates", "torch.Tensor"),
    "count": ({"coefficients": f(E, T + 1)}, ValueError, "coefficients", "T=2"),
    "count_1": ({"coefficients": f(E, 1)}, ValueError, "coefficients", "T=2"),
    "no_templates": ({"coefficients": f(E, 0), "templates": f(0, O, I)}, ValueError, "templates", "at least one"),
    "coefficients_0d": ({"coefficients": f()}, ValueError, "coefficients", "T"),
    "coefficients_int": ({"coefficients": f(E, T, dtype=torch.int64)}, TypeError, "coefficients", "int64"),
    "templates_double": ({"templates": f(T, O, I, dtype=torch.float64)}, TypeError, "templates", "float64"),
    "templates_on_meta": ({"templates": f(T, O, I, device="meta")}, ValueError, "templates", "meta"),
    "templates_sparse": ({"templates": f(T, O, I).to_sparse()}, TypeError, "templates", "sparse"),
}
BAD = {
    mix_templates: {**BOTH, "templates_0d": ({"templates": f()}, ValueError, "templates", "[T, *shape]")},
    mixture_linear: {
        **BOTH,
        "x_none": ({"x": None}, TypeError, "x", "torch.Tensor"),
        "bias_number": ({"bias": 0.0}, TypeError, "bias", "torch.Tensor"),
        "x_1d": ({"x": f(I)}, ValueError, "x", "[7]"),
        "x_4d": ({"x": f(1, E, B, I)}, ValueError, "x", "[1, 3, 5, 7]"),
        "x_inputs": ({"x": f(B, I + 1)}, ValueError, "x", "I=7"),
        "x_members": ({"x": f(E + 1, B, I)}, ValueError, "x", "E=3"),
        "x_members_1": ({"x": f(1, B, I)}, ValueError, "x", "E=3"),
        "coefficients_1d": ({"coefficients": f(T)}, ValueError, "coefficients", "[E, T=2]"),
        "coefficients_3d": ({"coefficients": f(E, 1, T)}, ValueError, "coefficients", "[E, T=2]"),
        "templates_2d": ({"templates": f(T, I)}, ValueError, "templates", "[T, O, I]"),
        "templates_4d": ({"templates": f(T, O, I, 1)}, ValueError, "templates", "[T, O, I]"),
        "templates_transposed": ({"templates": f(T, I, O)}, ValueError, "x", "I=4"),
        "bias_width": ({"bias": f(O + 1)}, ValueError, "bias", "[O=4] or [E=3, O=4]"),
        "bias_members": ({"bias": f(E + 1, O)}, ValueError, "bias", "[O=4] or [E=3, O=4]"),
        "x_half": ({"x": f(B, I, dtype=torch.float16)}, TypeError, "coefficients", "float16"),
        "bias_bfloat16": ({"bias": f(O, dtype=torch.bfloat16)}, TypeError, "bias", "bfloat16"),
    },
}
ops = pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)


@pytest.fixture
def computing_fails(monkeypatch):
    forbid(
        monkeypatch,
        (FORM, "apply"),
        (mixing, "apply"),
        (mixing_reference, "mix_templates"),
        (reference, "mixture_linear"),
    )


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize(
    ("op", "name"),
    [pytest.param(op, name, id=f"{op.__name__}-{name}") for op, cases in BAD.items() for name in cases],
)
@pytest.mark.usefixtures("computing_fails")
def test_bad_tensors(op, name, backend):
    changed, *expected = BAD[op][name]
    assert_refused(lambda: op(**{**GOOD[op], **changed}, backend=backend), op.__name__, *expected)


@ops
@pytest.mark.usefixtures("computing_fails")
@pytest.mark.parametrize("backend", ["CPU", "mkl", ""])
def test_unknown_backend(op, backend):
    with pytest.raises(ValueError, match=f"{op.__name__}: backend should be None or one of 'reference', 'cpu'"):
        op(**GOOD[op], backend=backend)


@pytest.mark.usefixtures("computing_fails")
@pytest.mark.parametrize("activation", ["Relu", "", 1, ["relu"]], ids=repr)
def test_unknown_activation(activation):
    with pytest.raises(ValueError, match="mixture_linear: activation should be one of None, 'relu'") as raised:
        mixture_linear(**GOOD[mixture_linear], activation=activation)
    assert f"got {activation!r}" in str(raised.value)


@ops
def test_missing_arguments_and_positional_options(op):
    good = list(GOOD[op].values())
    with pytest.raises(TypeError):
        op(good[0])
    with pytest.raises(TypeError):
        op(*good, "cpu")


@pytest.mark.parametrize(
    "arguments",
    [
        (f(E, T), f(T + 1, I)),
        (f(20, 0), f(0, I)),
        (f(T), f(T, I)),
        (f(E, T), f(T, O, I)),
        (f(E, T), f(T, I, dtype=torch.float64)),
        (f(E, T, dtype=torch.int32), f(T, I, dtype=torch.int32)),
    ],
    ids=["count", "no_templates", "coefficients_1d", "templates_3d", "dtypes", "int"],
)
def test_direct_calls_of_the_schema_are_checked_too(arguments):
    with pytest.raises(RuntimeError, match="mix_templates_fwd"):
        _native.ops.mix_templates_fwd(*arguments)
    grad = torch.zeros(E, I)
    with pytest.raises(RuntimeError, match="mix_templates_bwd"):
        _native.ops.mix_templates_bwd(grad, *arguments, True, True)


@pytest.mark.parametrize("grad", [f(E, I + 1), f(E + 1, I), f(E, I, dtype=torch.float64), f(I)], ids=str)
def test_gradients_that_do_not_fit(grad):
    with pytest.raises(RuntimeError, match="mix_templates_bwd"):
        _native.ops.mix_templates_bwd(grad, f(E, T), f(T, I), True, True)
