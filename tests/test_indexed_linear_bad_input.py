"""Bad input of indexed_linear: errors that name the argument, and come before any computation."""

from __future__ import annotations

import pytest
import torch
from bad_input import assert_refused, f, forbid
from torch import Tensor
from torch.func import vmap

from effens_kernels import _native, indexed_linear
from effens_kernels.ops.indexed_linear import reference
from effens_kernels.ops.indexed_linear.autograd import FORM

P, E, G, B, I, O = 2, 3, 4, 5, 7, 6


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def arguments(**changed):
    good = {"x": f(P, B, I), "weight": f(E, O, I), "bias": f(E, O)}
    return {**good, "x_index": index(0, 1, 1, 0), "weight_index": index(2, 0, 1, 1), **changed}


# name: (what is changed, error, argument that is named, words that must be there)
BAD = {
    "x_list": ({"x": [[1.0]]}, TypeError, "x", "torch.Tensor"),
    "weight_none": ({"weight": None}, TypeError, "weight", "torch.Tensor"),
    "x_2d": ({"x": f(B, I)}, ValueError, "x", "[P, B, I]"),
    "x_4d": ({"x": f(1, P, B, I)}, ValueError, "x", "[P, B, I]"),
    "x_inputs": ({"x": f(P, B, I + 1)}, ValueError, "x", "I=7"),
    "x_inputs_1": ({"x": f(P, B, 1)}, ValueError, "x", "I=7"),
    "weight_2d": ({"weight": f(O, I)}, ValueError, "weight", "[E, O, I]"),
    "bias_width": ({"bias": f(O + 1)}, ValueError, "bias", "[O=6] or [E=3, O=6]"),
    "bias_members": ({"bias": f(E + 1, O)}, ValueError, "bias", "[O=6] or [E=3, O=6]"),
    "bias_groups": ({"bias": f(G, O)}, ValueError, "bias", "[O=6] or [E=3, O=6]"),
    "x_int": ({"x": f(P, B, I, dtype=torch.int64)}, TypeError, "x", "int64"),
    "weight_double": ({"weight": f(E, O, I, dtype=torch.float64)}, TypeError, "weight", "float64"),
    "bias_half": ({"bias": f(E, O, dtype=torch.float16)}, TypeError, "bias", "float16"),
    "weight_on_meta": ({"weight": f(E, O, I, device="meta")}, ValueError, "weight", "meta"),
    "x_index_list": ({"x_index": [0, 1, 1, 0]}, TypeError, "x_index", "torch.Tensor"),
    "x_index_none": ({"x_index": None}, TypeError, "x_index", "torch.Tensor"),
    "weight_index_number": ({"weight_index": 1}, TypeError, "weight_index", "torch.Tensor"),
    "x_index_float": ({"x_index": f(G)}, TypeError, "x_index", "int32 or int64"),
    "x_index_bool": ({"x_index": f(G, dtype=torch.bool)}, TypeError, "x_index", "int32 or int64"),
    "weight_index_uint8": ({"weight_index": f(G, dtype=torch.uint8)}, TypeError, "weight_index", "int32 or int64"),
    "weight_index_int16": ({"weight_index": f(G, dtype=torch.int16)}, TypeError, "weight_index", "int32 or int64"),
    "x_index_2d": ({"x_index": index(0, 1, 1, 0)[None]}, ValueError, "x_index", "one dimension"),
    "weight_index_0d": ({"weight_index": torch.tensor(1)}, ValueError, "weight_index", "one dimension"),
    "lengths": ({"weight_index": index(0, 1, 1)}, ValueError, "weight_index", "[G=4] like x_index"),
    "x_index_on_meta": ({"x_index": index(0, 1, 1, 0).to("meta")}, ValueError, "x_index", "meta"),
    "x_index_sparse": ({"x_index": index(0, 1, 1, 0).to_sparse()}, TypeError, "x_index", "sparse"),
    "x_index_high": ({"x_index": index(0, 1, 2, 3)}, ValueError, "x_index", "0..1, of x, got 2 at position 2"),
    "x_index_low": ({"x_index": index(0, -1, 1, 3)}, ValueError, "x_index", "0..1, of x, got -1 at position 1"),
    "weight_index_high": (
        {"weight_index": index(0, 2, 2, 3, dtype=torch.int32)},
        ValueError,
        "weight_index",
        "0..2, of weight, got 3 at position 3",
    ),
    "weight_index_low": ({"weight_index": index(-5, 0, 0, 9)}, ValueError, "weight_index", "got -5 at position 0"),
    "index_huge": ({"x_index": index(0, 1, 1, 2**62)}, ValueError, "x_index", "got 4611686018427387904 at position 3"),
    "no_x": ({"x": f(0, B, I)}, ValueError, "x_index", "empty, as there is none of x, got 0 at position 0"),
    "no_weight": ({"weight": f(0, O, I), "bias": None}, ValueError, "weight_index", "got 2 at position 0"),
}


@pytest.fixture
def computing_fails(monkeypatch):
    forbid(monkeypatch, (FORM, "apply"), (reference, "indexed_linear"))


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("computing_fails")
def test_bad_tensors(name, backend):
    changed, *expected = BAD[name]
    assert_refused(lambda: indexed_linear(**arguments(**changed), backend=backend), "indexed_linear", *expected)


@pytest.mark.usefixtures("computing_fails")
def test_unknown_activation_and_backend():
    with pytest.raises(ValueError, match="indexed_linear: activation should be one of None, 'relu', 'gelu'"):
        indexed_linear(**arguments(), activation="Relu")
    with pytest.raises(ValueError, match="indexed_linear: backend should be None or one of 'reference', 'cpu'"):
        indexed_linear(**arguments(), backend="mkl")


@pytest.mark.parametrize("name", [name for name in BAD if "got" in BAD[name][3]])
def test_bad_values_where_python_may_not_see_them(name):
    """Under torch.compile the kernel looks, under torch.func whoever gets to see the values."""
    torch._dynamo.reset()
    _, _, argument, words = BAD[name]
    bad = arguments(**BAD[name][0])
    calls = {
        "compile": lambda: torch.compile(indexed_linear, fullgraph=True, backend="aot_eager")(**bad, backend="cpu"),
        "vmap": lambda: vmap(lambda x: indexed_linear(**{**bad, "x": x}))(bad["x"][None]),
    }
    for call in calls.values():
        with pytest.raises((RuntimeError, ValueError), match=argument) as raised:
            call()
        assert words[words.index("got") :] in str(raised.value)


def test_vmap_over_a_bad_index_raises():
    """One too large for its instance would be in range of the next."""
    x, weight = f(2, P, B, I), f(E, O, I)
    bad = torch.tensor([[0, P], [0, 1]])
    with pytest.raises(ValueError, match=r"x_index should be in 0\.\.1"):
        vmap(lambda x, i: indexed_linear(x, weight, x_index=i, weight_index=index(0, 1)))(x, bad)


def fwd(code=0, **changed):
    x, weight, bias, *numbers = arguments(**changed).values()
    return _native.ops.indexed_linear_fwd(x, weight, *numbers, bias, code, False)


def bwd(grad=None, saved=None, code=1, **changed):
    x, weight, _, *numbers = arguments(**changed).values()
    grad, saved = (f(G, B, O) if t is None else t for t in (grad, saved))
    return _native.ops.indexed_linear_bwd(grad, x, weight, *numbers, saved, code, True, True, True)


TENSORS = {name: bad[0] for name, bad in BAD.items() if all(isinstance(t, Tensor) for t in bad[0].values())}
DIRECT = {f"{way.__name__}_{name}": (way, changed) for name, changed in TENSORS.items() for way in (fwd, bwd)}
DIRECT = {name: d for name, d in DIRECT.items() if not name.startswith("bwd_bias")}
DIRECT |= {
    "fwd_bias_1d": (fwd, {"bias": f(O)}),  # Python expands it
    "fwd_activation": (fwd, {"code": 7}),
    "bwd_grad_short": (bwd, {"grad": f(G, B, O - 1)}),
    "bwd_grad_groups": (bwd, {"grad": f(G - 1, B, O)}),
    "bwd_grad_dtype": (bwd, {"grad": f(G, B, O).double()}),
    "bwd_saved_missing": (bwd, {"saved": f(0)}),
    "bwd_activation": (bwd, {"code": -1}),
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_calls_of_the_extension(name):
    """The schemas can be called by anyone: nonsense raises instead of reading beyond a tensor."""
    way, changed = DIRECT[name]
    with pytest.raises((RuntimeError, NotImplementedError)):
        way(**changed)
