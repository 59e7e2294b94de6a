"""Bad input of ragged_linear: errors that name the argument, and come before any computation."""

from __future__ import annotations

import pytest
import torch
from bad_input import assert_refused, f, forbid
from torch import Tensor
from torch.func import grad, vmap

from effens_kernels import _native, ragged_linear
from effens_kernels.ops.ragged_linear import reference
from effens_kernels.ops.ragged_linear.autograd import FORM

E, N, I, O = 3, 9, 7, 6


def at(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def arguments(**changed):
    good = {"x": f(N, I), "weight": f(E, O, I), "bias": f(E, O), "offsets": at(0, 4, 4, 9)}
    return {**good, **changed}


# name: (what is changed, error, argument that is named, words that must be there)
BAD = {
    "x_list": ({"x": [[1.0]]}, TypeError, "x", "torch.Tensor"),
    "weight_none": ({"weight": None}, TypeError, "weight", "torch.Tensor"),
    "x_1d": ({"x": f(I)}, ValueError, "x", "[N, I]"),
    "x_3d": ({"x": f(1, N, I)}, ValueError, "x", "[N, I]"),
    "x_inputs": ({"x": f(N, I + 1)}, ValueError, "x", "I=7"),
    "x_inputs_1": ({"x": f(N, 1)}, ValueError, "x", "I=7"),
    "weight_2d": ({"weight": f(O, I)}, ValueError, "weight", "[E, O, I]"),
    "bias_width": ({"bias": f(O + 1)}, ValueError, "bias", "[O=6] or [E=3, O=6]"),
    "bias_members": ({"bias": f(E + 1, O)}, ValueError, "bias", "[O=6] or [E=3, O=6]"),
    "x_int": ({"x": f(N, I, dtype=torch.int64)}, TypeError, "x", "int64"),
    "weight_double": ({"weight": f(E, O, I, dtype=torch.float64)}, TypeError, "weight", "float64"),
    "bias_half": ({"bias": f(E, O, dtype=torch.float16)}, TypeError, "bias", "float16"),
    "weight_on_meta": ({"weight": f(E, O, I, device="meta")}, ValueError, "weight", "meta"),
    "offsets_list": ({"offsets": [0, 4, 4, 9]}, TypeError, "offsets", "torch.Tensor"),
    "offsets_none": ({"offsets": None}, TypeError, "offsets", "torch.Tensor"),
    "offsets_float": ({"offsets": f(E + 1)}, TypeError, "offsets", "int32 or int64"),
    "offsets_int16": ({"offsets": at(0, 4, 4, 9, dtype=torch.int16)}, TypeError, "offsets", "int32 or int64"),
    "offsets_2d": ({"offsets": at(0, 4, 4, 9)[None]}, ValueError, "offsets", "one dimension"),
    "offsets_0d": ({"offsets": torch.tensor(0)}, ValueError, "offsets", "one dimension"),
    "offsets_short": ({"offsets": at(0, 4, 9)}, ValueError, "offsets", "[E + 1 = 4]"),
    "offsets_long": ({"offsets": at(0, 4, 4, 4, 9)}, ValueError, "offsets", "[E + 1 = 4]"),
    "offsets_none_at_all": ({"offsets": at()}, ValueError, "offsets", "[E + 1 = 4]"),
    "offsets_on_meta": ({"offsets": at(0, 4, 4, 9).to("meta")}, ValueError, "offsets", "meta"),
    "offsets_sparse": ({"offsets": at(0, 4, 4, 9).to_sparse()}, TypeError, "offsets", "sparse"),
    "offsets_start": ({"offsets": at(1, 4, 4, 9)}, ValueError, "offsets", "0 at position 0, got 1"),
    "offsets_negative": ({"offsets": at(-1, 4, 4, 9)}, ValueError, "offsets", "0 at position 0, got -1"),
    "offsets_end": ({"offsets": at(0, 4, 4, 8)}, ValueError, "offsets", "N=9 at position 3, the last, got 8"),
    "offsets_beyond": (
        {"offsets": at(0, 4, 4, 10, dtype=torch.int32)},
        ValueError,
        "offsets",
        "N=9 at position 3, the last, got 10",
    ),
    "offsets_falling": (
        {"offsets": at(0, 5, 4, 9)},
        ValueError,
        "offsets",
        "at least 5 at position 2, as before it, got 4",
    ),
    "offsets_over_and_back": (
        {"offsets": at(0, 2**40, 4, 9)},
        ValueError,
        "offsets",
        "position 2, as before it, got 4",
    ),
    "rows_of_nobody": (
        {"weight": f(0, O, I), "bias": None, "offsets": at(0)},
        ValueError,
        "offsets",
        "N=9 at position 0",
    ),
}


@pytest.fixture
def computing_fails(monkeypatch):
    forbid(monkeypatch, (FORM, "apply"), (reference, "ragged_linear"))


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("computing_fails")
def test_bad_tensors(name, backend):
    changed, *expected = BAD[name]
    assert_refused(lambda: ragged_linear(**arguments(**changed), backend=backend), "ragged_linear", *expected)


@pytest.mark.usefixtures("computing_fails")
def test_unknown_activation_and_backend():
    with pytest.raises(ValueError, match="ragged_linear: activation should be one of None, 'relu', 'gelu'"):
        ragged_linear(**arguments(), activation="Relu")
    with pytest.raises(ValueError, match="ragged_linear: backend should be None or one of 'reference', 'cpu'"):
        ragged_linear(**arguments(), backend="mkl")


@pytest.mark.parametrize("name", [name for name in BAD if " at position " in BAD[name][3] or "over" in name])
def test_bad_values_where_python_may_not_see_them(name):
    """Under torch.compile the kernel looks, under torch.func whoever gets to see the values."""
    torch._dynamo.reset()
    bad = arguments(**BAD[name][0])
    calls = {
        "compile": lambda: torch.compile(ragged_linear, fullgraph=True, backend="aot_eager")(**bad, backend="cpu"),
        "grad": lambda: grad(lambda x: ragged_linear(**{**bad, "x": x}).sum())(bad["x"]),
        "vmap": lambda: vmap(lambda x: ragged_linear(**{**bad, "x": x}))(torch.stack([bad["x"]] * 2)),
        "vmap over all": lambda: vmap(lambda x, weight: ragged_linear(**{**bad, "x": x, "weight": weight}))(
            *(torch.stack([bad[name]] * 2) for name in ("x", "weight"))
        ),
    }
    for call in calls.values():
        with pytest.raises((RuntimeError, ValueError), match="offsets should"):
            call()


def fwd(code=0, **changed):
    x, weight, bias, offsets = arguments(**changed).values()
    return _native.ops.ragged_linear_fwd(x, weight, offsets, bias, code, False)


def bwd(grad=None, saved=None, code=1, **changed):
    x, weight, _, offsets = arguments(**changed).values()
    grad, saved = (f(N, O) if t is None else t for t in (grad, saved))
    return _native.ops.ragged_linear_bwd(grad, x, weight, offsets, saved, code, True, True, True)


TENSORS = {name: changed for name, (changed, *_) in BAD.items() if all(isinstance(t, Tensor) for t in changed.values())}
DIRECT = {f"{way.__name__}_{name}": (way, changed) for name, changed in TENSORS.items() for way in (fwd, bwd)}
DIRECT = {name: d for name, d in DIRECT.items() if not name.startswith("bwd_bias")}
DIRECT |= {
    "fwd_bias_1d": (fwd, {"bias": f(O)}),  # Python expands it
    "fwd_activation": (fwd, {"code": 7}),
    "bwd_grad_short": (bwd, {"grad": f(N, O - 1)}),
    "bwd_grad_rows": (bwd, {"grad": f(N - 1, O)}),
    "bwd_grad_dtype": (bwd, {"grad": f(N, O).double()}),
    "bwd_saved_missing": (bwd, {"saved": f(0)}),
    "bwd_activation": (bwd, {"code": -1}),
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_calls_of_the_extension(name):
    """The schemas can be called by anyone: nonsense raises instead of reading beyond a tensor."""
    way, changed = DIRECT[name]
    with pytest.raises((RuntimeError, NotImplementedError)):
        way(**changed)
