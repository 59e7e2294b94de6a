"""Bad input of rank1_linear: errors that name op, argument, what was expected and what came, before any computation."""

from __future__ import annotations

import pytest
import torch
from bad_input import assert_refused, f, forbid

from effens_kernels import _native, rank1_linear
from effens_kernels.ops.rank1_linear import reference
from effens_kernels.ops.rank1_linear.autograd import FORM

E, B, I, O = 3, 5, 7, 4


def arguments(**changed):
    good = {"x": f(B, I), "weight": f(O, I), "r": f(E, I), "s": f(E, O), "bias": f(O)}
    return {**good, **changed}


# name: (what is changed, error, argument that is named, words that must be there)
BAD = {
    "x_list": ({"x": [[1.0]]}, TypeError, "x", "torch.Tensor"),
    "weight_none": ({"weight": None}, TypeError, "weight", "torch.Tensor"),
    "r_number": ({"r": 1.0}, TypeError, "r", "torch.Tensor"),
    "s_none": ({"s": None}, TypeError, "s", "torch.Tensor"),
    "bias_number": ({"bias": 0.0}, TypeError, "bias", "torch.Tensor"),
    "x_1d": ({"x": f(I)}, ValueError, "x", "[7]"),
    "x_4d": ({"x": f(1, E, B, I)}, ValueError, "x", "[1, 3, 5, 7]"),
    "x_inputs": ({"x": f(B, I + 1)}, ValueError, "x", "I=7"),
    "x_inputs_1": ({"x": f(B, 1)}, ValueError, "x", "I=7"),
    "x_members": ({"x": f(E + 1, B, I)}, ValueError, "x", "E=3"),
    "x_members_1": ({"x": f(1, B, I)}, ValueError, "x", "E=3"),
    "weight_3d": ({"weight": f(E, O, I)}, ValueError, "weight", "[O, I]"),
    "weight_1d": ({"weight": f(I)}, ValueError, "weight", "[O, I]"),
    "weight_transposed": ({"weight": f(I, O)}, ValueError, "x", "I=4"),
    "r_1d": ({"r": f(I)}, ValueError, "r", "[E, I=7]"),
    "r_width": ({"r": f(E, I + 1)}, ValueError, "r", "[E, I=7]"),
    "r_width_1": ({"r": f(E, 1)}, ValueError, "r", "[E, I=7]"),
    "s_1d": ({"s": f(O)}, ValueError, "s", "[E, O=4]"),
    "s_width": ({"s": f(E, O - 1)}, ValueError, "s", "[E, O=4]"),
    "s_members": ({"s": f(E + 1, O)}, ValueError, "s", "[E=3, O=4]"),
    "r_members": ({"r": f(E + 1, I)}, ValueError, "s", "[E=4, O=4]"),
    "r_and_s_swapped": ({"r": f(E, O), "s": f(E, I)}, ValueError, "r", "[E, I=7]"),
    "bias_width": ({"bias": f(O + 1)}, ValueError, "bias", "[O=4] or [E=3, O=4]"),
    "bias_members": ({"bias": f(E + 1, O)}, ValueError, "bias", "[O=4] or [E=3, O=4]"),
    "bias_members_1": ({"bias": f(1, O)}, ValueError, "bias", "[O=4] or [E=3, O=4]"),
    "bias_0d": ({"bias": f()}, ValueError, "bias", "[O=4] or [E=3, O=4]"),
    "x_int": ({"x": f(B, I, dtype=torch.int64)}, TypeError, "x", "int64"),
    "weight_double": ({"weight": f(O, I, dtype=torch.float64)}, TypeError, "weight", "float64"),
    "r_half": ({"r": f(E, I, dtype=torch.float16)}, TypeError, "r", "float16"),
    "s_double": ({"s": f(E, O, dtype=torch.float64)}, TypeError, "s", "float64"),
    "s_bool": ({"s": f(E, O, dtype=torch.bool)}, TypeError, "s", "bool"),
    "bias_bfloat16": ({"bias": f(O, dtype=torch.bfloat16)}, TypeError, "bias", "bfloat16"),
    "x_half": ({"x": f(B, I, dtype=torch.float16)}, TypeError, "weight", "float16"),
    "r_on_meta": ({"r": f(E, I, device="meta")}, ValueError, "r", "meta"),
    "s_on_meta": ({"s": f(E, O, device="meta")}, ValueError, "s", "meta"),
    "r_sparse": ({"r": f(E, I).to_sparse()}, TypeError, "r", "sparse"),
}


@pytest.fixture
def computing_fails(monkeypatch):
    forbid(monkeypatch, (FORM, "apply"), (reference, "rank1_linear"))


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("computing_fails")
def test_bad_tensors(name, backend):
    changed, *expected = BAD[name]
    assert_refused(lambda: rank1_linear(**arguments(**changed), backend=backend), "rank1_linear", *expected)


@pytest.mark.usefixtures("computing_fails")
@pytest.mark.parametrize("activation", ["Relu", "", 1, ["relu"]], ids=repr)
def test_unknown_activation(activation):
    with pytest.raises(ValueError, match="rank1_linear: activation should be one of None, 'relu', 'gelu'") as raised:
        rank1_linear(**arguments(), activation=activation)
    assert f"got {activation!r}" in str(raised.value)


@pytest.mark.usefixtures("computing_fails")
@pytest.mark.parametrize("backend", ["CPU", "mkl", ""])
def test_unknown_backend(backend):
    with pytest.raises(ValueError, match="rank1_linear: backend should be None or one of 'reference', 'cpu'"):
        rank1_linear(**arguments(), backend=backend)


def test_missing_arguments_and_positional_options():
    good = list(arguments().values())
    with pytest.raises(TypeError):
        rank1_linear(*good[:3])
    with pytest.raises(TypeError):
        rank1_linear(*good, "relu")


def fwd(x=None, weight=None, r=None, s=None, bias=None, code=0):
    tensors = [f(B, I), f(O, I), f(E, I), f(E, O)]
    x, weight, r, s = (good if t is None else t for t, good in zip((x, weight, r, s), tensors))
    return _native.ops.rank1_linear_fwd(x, weight, r, s, bias, code, False)


def bwd(grad=None, saved=None, code=1, **changed):
    tensors = list({**arguments(), **changed}.values())[:4]
    y = f(E, B, O)
    grad, saved = (y if t is None else t for t in (grad, saved))
    return _native.ops.rank1_linear_bwd(grad, *tensors, saved, code, True, True, True, True, True)


DIRECT = {
    "fwd_x_1d": lambda: fwd(x=f(I)),
    "fwd_x_members": lambda: fwd(x=f(E + 1, B, I)),
    "fwd_x_inputs": lambda: fwd(x=f(B, I + 1)),
    "fwd_weight_3d": lambda: fwd(weight=f(E, O, I)),
    "fwd_weight_dtype": lambda: fwd(weight=f(O, I).double()),
    "fwd_r_width": lambda: fwd(r=f(E, I - 1)),
    "fwd_r_1d": lambda: fwd(r=f(I)),
    "fwd_s_members": lambda: fwd(s=f(E - 1, O)),
    "fwd_s_dtype": lambda: fwd(s=f(E, O).half()),
    "fwd_bias_1d": lambda: fwd(bias=f(O)),
    "fwd_activation": lambda: fwd(code=7),
    "fwd_int": lambda: fwd(x=f(B, I).long(), weight=f(O, I).long(), r=f(E, I).long(), s=f(E, O).long()),
    "bwd_grad_short": lambda: bwd(grad=f(E, B, O - 1)),
    "bwd_grad_dtype": lambda: bwd(grad=f(E, B, O).double()),
    "bwd_saved_missing": lambda: bwd(saved=f(0)),
    "bwd_x": lambda: bwd(x=f(B + 1, I)),
    "bwd_s": lambda: bwd(s=f(E, O + 1)),
    "bwd_activation": lambda: bwd(code=-1),
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_calls_of_the_extension(name):
    """The schemas can be called by anyone: nonsense raises instead of reading beyond a tensor."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        DIRECT[name]()
