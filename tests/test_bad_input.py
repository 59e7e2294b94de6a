"""Bad input is refused before anything is computed, in words: op, argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from bad_input import assert_refused, f, forbid
from common import run_python

from effens_kernels import _dispatch, _native, grouped_linear, multihead_linear
from effens_kernels.ops.grouped_linear import reference
from effens_kernels.ops.grouped_linear.autograd import FORM
from effens_kernels.testing import LinearCase

E, B, I, O, H = 3, 5, 7, 4, 2
CASE = LinearCase(E, B, I, O)


@pytest.fixture
def computing_fails(monkeypatch):
    forbid(monkeypatch, (FORM, "apply"), (reference, "grouped_linear"))


# name: (arguments, error, argument that is named, words that must be there)
GROUPED = {
    "x_list": (([[1.0]], f(E, O, I)), TypeError, "x", "torch.Tensor"),
    "x_none": ((None, f(E, O, I)), TypeError, "x", "torch.Tensor"),
    "weight_number": ((f(B, I), 3.0), TypeError, "weight", "torch.Tensor"),
    "bias_number": ((f(B, I), f(E, O, I), 1.0), TypeError, "bias", "torch.Tensor"),
    "x_1d": ((f(I), f(E, O, I)), ValueError, "x", "[7]"),
    "x_4d": ((f(1, E, B, I), f(E, O, I)), ValueError, "x", "[1, 3, 5, 7]"),
    "x_0d": ((f(), f(E, O, I)), ValueError, "x", "[]"),
    "weight_2d": ((f(B, I), f(O, I)), ValueError, "weight", "[4, 7]"),
    "weight_4d": ((f(B, I), f(E, H, O, I)), ValueError, "weight", "[3, 2, 4, 7]"),
    "inputs_differ": ((f(B, I + 1), f(E, O, I)), ValueError, "x", "I=7"),
    "inputs_differ_per_member": ((f(E, B, I + 1), f(E, O, I)), ValueError, "x", "I=7"),
    "inputs_1_does_not_broadcast": ((f(B, 1), f(E, O, I)), ValueError, "x", "I=7"),
    "members_differ": ((f(E + 1, B, I), f(E, O, I)), ValueError, "x", "E=3"),
    "members_1_does_not_broadcast": ((f(1, B, I), f(E, O, I)), ValueError, "x", "E=3"),
    "transposed_weight": ((f(B, I), f(E, I, O)), ValueError, "x", "I=4"),
    "bias_1d": ((f(B, I), f(E, O, I), f(O)), ValueError, "bias", "[E=3, O=4]"),
    "bias_members": ((f(B, I), f(E, O, I), f(E + 1, O)), ValueError, "bias", "[E=3, O=4]"),
    "bias_outputs": ((f(B, I), f(E, O, I), f(E, O + 1)), ValueError, "bias", "[E=3, O=4]"),
    "bias_does_not_broadcast": ((f(B, I), f(E, O, I), f(1, O)), ValueError, "bias", "[E=3, O=4]"),
    "x_int": ((f(B, I, dtype=torch.int64), f(E, O, I)), TypeError, "x", "int64"),
    "x_bool": ((f(B, I, dtype=torch.bool), f(E, O, I)), TypeError, "x", "bool"),
    "x_complex": ((f(B, I, dtype=torch.complex64), f(E, O, I)), TypeError, "x", "complex64"),
    "weight_int": ((f(B, I), f(E, O, I, dtype=torch.int32)), TypeError, "weight", "int32"),
    "bias_int": ((f(B, I), f(E, O, I), f(E, O, dtype=torch.int8)), TypeError, "bias", "int8"),
    "weight_double": ((f(B, I), f(E, O, I, dtype=torch.float64)), TypeError, "weight", "float64"),
    "x_half": ((f(B, I, dtype=torch.float16), f(E, O, I)), TypeError, "weight", "float16"),
    "bias_bfloat16": ((f(B, I), f(E, O, I), f(E, O, dtype=torch.bfloat16)), TypeError, "bias", "bfloat16"),
    "weight_on_meta": ((f(B, I), f(E, O, I, device="meta")), ValueError, "weight", "meta"),
    "bias_on_meta": ((f(B, I), f(E, O, I), f(E, O, device="meta")), ValueError, "bias", "meta"),
    "x_sparse": ((f(B, I).to_sparse(), f(E, O, I)), TypeError, "x", "sparse"),
    "weight_sparse": ((f(B, I), f(E, O, I).to_sparse()), TypeError, "weight", "sparse"),
    "bias_sparse": ((f(B, I), f(E, O, I), f(E, O).to_sparse()), TypeError, "bias", "sparse"),
}
HEADS = {
    "x_list": (([1.0], f(H, O, I)), TypeError, "x", "torch.Tensor"),
    "weight_none": ((f(B, I), None), TypeError, "weight", "torch.Tensor"),
    "weight_2d": ((f(B, I), f(O, I)), ValueError, "weight", "[4, 7]"),
    "weight_5d": ((f(B, I), f(1, E, H, O, I)), ValueError, "weight", "[1, 3, 2, 4, 7]"),
    "x_1d": ((f(I), f(H, O, I)), ValueError, "x", "[7]"),
    "members_without_members": ((f(E, B, I), f(H, O, I)), ValueError, "x", "[3, 5, 7]"),
    "members_differ": ((f(E + 1, B, I), f(E, H, O, I)), ValueError, "x", "E=3"),
    "inputs_differ": ((f(B, I + 1), f(H, O, I)), ValueError, "x", "I=7"),
    "bias_1d": ((f(B, I), f(H, O, I), f(O)), ValueError, "bias", "[2, 4]"),
    "bias_outputs": ((f(B, I), f(H, O, I), f(H, O + 1)), ValueError, "bias", "[2, 4]"),
    "bias_per_head_only": ((f(B, I), f(E, H, O, I), f(H, O)), ValueError, "bias", "[3, 2, 4]"),
    "weight_int": ((f(B, I), f(H, O, I, dtype=torch.int64)), TypeError, "weight", "int64"),
    "weight_double": ((f(B, I), f(H, O, I, dtype=torch.float64)), TypeError, "weight", "float64"),
    "bias_half": ((f(B, I), f(H, O, I), f(H, O, dtype=torch.float16)), TypeError, "bias", "float16"),
    "weight_on_meta": ((f(B, I), f(H, O, I, device="meta")), ValueError, "weight", "meta"),
    "x_sparse": ((f(B, I).to_sparse(), f(H, O, I)), TypeError, "x", "sparse"),
}
CALLS = [
    pytest.param(op, *bad, id=f"{op.__name__}-{name}")
    for op, table in ((grouped_linear, GROUPED), (multihead_linear, HEADS))
    for name, bad in table.items()
]


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize(("op", "arguments", "error", "argument", "words"), CALLS)
@pytest.mark.usefixtures("computing_fails")
def test_bad_tensors(op, arguments, error, argument, words, backend):
    assert_refused(lambda: op(*arguments, backend=backend), op.__name__, error, argument, words)


@pytest.mark.usefixtures("computing_fails")
@pytest.mark.parametrize(
    "activation",
    ["Relu", "sigmoid", "", 1, torch.relu, ["relu"]],
    ids=["case", "other", "empty", "number", "function", "list"],
)
def test_unknown_activation(activation):
    with pytest.raises(ValueError, match=r"grouped_linear: activation should be one of None, 'relu', 'gelu'") as raised:
        grouped_linear(*CASE.inputs_for(), activation=activation)
    assert f"got {activation!r}" in str(raised.value)


@pytest.mark.usefixtures("computing_fails")
@pytest.mark.parametrize("backend", ["CPU", "mkl", ""])
@pytest.mark.parametrize("op", [grouped_linear, multihead_linear])
def test_unknown_backend(op, backend):
    with pytest.raises(ValueError, match="backend should be None or one of 'reference', 'cpu', 'triton', 'cuda'") as e:
        op(*LinearCase(E, B, I, O, heads=H if op is multihead_linear else None).inputs_for(), backend=backend)
    assert f"got {backend!r}" in str(e.value)


def test_missing_arguments_and_positional_options():
    x, weight, bias = CASE.inputs_for()
    with pytest.raises(TypeError):
        grouped_linear(x)
    with pytest.raises(TypeError):
        grouped_linear(x, weight, bias, "relu")
    with pytest.raises(TypeError):
        multihead_linear(x, weight, bias, "cpu")


# ---------------------------------------------------------------------------------------------------- backends


@pytest.mark.usefixtures("computing_fails")
def test_backends_refuse_dtypes_they_lack():
    for backend in ("triton", "cuda"):
        assert torch.float64 not in _dispatch.IMPLEMENTED["grouped_linear"].get(backend, ())
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call"):
            grouped_linear(*CASE.inputs_for(torch.float64), backend=backend)


CALL = (
    "import torch, effens_kernels as ek; x, w = torch.ones(2, 3), torch.ones(4, 5, 3); y = ek.grouped_linear(x, w{});"
)
REFUSED = {
    "triton_without_gpu_or_interpreter": ("backend='triton'", {}, "the tensors are on cpu, it takes cuda tensors"),
    "cuda_without_gpu_or_emulation": ("backend='cuda'", {}, "the tensors are on cpu, it takes cuda tensors"),
    "cpu_switched_off": ("backend='cpu'", {"EFFENS_NATIVE": "0"}, "switched off by EFFENS_NATIVE=0"),
    "default_cannot_run": ("backend=None", {"EFFENS_BACKEND": "cuda"}, "backend 'cuda' cannot run this call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_backend_says_why_and_never_falls_back(name):
    option, environment, reason = REFUSED[name]
    result = run_python(CALL.format(", " + option) + " print('computed')", **environment)
    assert result.returncode != 0
    assert "computed" not in result.stdout
    assert "ValueError: grouped_linear: backend '" in result.stderr
    assert reason in result.stderr


def test_environment_chooses_and_argument_overrides():
    """EFFENS_BACKEND is the default, backend= wins; without the extension automatic choice is the reference."""
    code = CALL.format("") + (
        "from effens_kernels import _dispatch as d; p = d.Problem('grouped_linear', 'cpu', torch.float32); "
        "print(d.select(p), d.select(p, 'cpu') if d.why_not('cpu', p) is None else 'none', y.shape)"
    )
    chosen = [
        run_python(code, **environment).stdout.split()[:2]
        for environment in ({"EFFENS_BACKEND": "reference"}, {"EFFENS_NATIVE": "0"}, {})
    ]
    assert chosen == [["reference", "cpu"], ["reference", "none"], ["cpu", "cpu"]]


# ------------------------------------------------------------------------------------ the C++ checks behind the op


def native_bwd(grad, x, weight, saved, code=1, need=(True, True, True)):
    return _native.ops.grouped_linear_bwd(grad, x, weight, saved, code, *need)


Y = f(E, B, O)
DIRECT = {
    "fwd_x_1d": lambda n: n.grouped_linear_fwd(f(I), f(E, O, I), None, 0, False),
    "fwd_x_0d": lambda n: n.grouped_linear_fwd(f(), f(E, O, I), None, 0, False),
    "fwd_x_4d": lambda n: n.grouped_linear_fwd(f(1, E, B, I), f(E, O, I), None, 0, False),
    "fwd_weight_2d": lambda n: n.grouped_linear_fwd(f(B, I), f(O, I), None, 0, False),
    "fwd_inputs": lambda n: n.grouped_linear_fwd(f(B, I + 1), f(E, O, I), None, 0, False),
    "fwd_members": lambda n: n.grouped_linear_fwd(f(E + 1, B, I), f(E, O, I), None, 0, False),
    "fwd_bias_1d": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I), f(O), 0, False),
    "fwd_bias_short": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I), f(E, O - 1), 0, False),
    "fwd_bias_dtype": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I), f(E, O).double(), 0, False),
    "fwd_weight_dtype": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I).double(), None, 0, False),
    "fwd_int": lambda n: n.grouped_linear_fwd(f(B, I).long(), f(E, O, I).long(), None, 0, False),
    "fwd_activation": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I), None, 5, False),
    "fwd_activation_negative": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I), None, -1, False),
    "fwd_meta": lambda n: n.grouped_linear_fwd(f(B, I), f(E, O, I, device="meta"), None, 0, False),
    "fwd_sparse": lambda n: n.grouped_linear_fwd(f(B, I).to_sparse(), f(E, O, I), None, 0, False),
    "bwd_grad_short": lambda n: native_bwd(f(E, B, O - 1), f(B, I), f(E, O, I), Y),
    "bwd_grad_2d": lambda n: native_bwd(f(B, O), f(B, I), f(E, O, I), Y),
    "bwd_grad_dtype": lambda n: native_bwd(Y.double(), f(B, I), f(E, O, I), Y),
    "bwd_saved_missing": lambda n: native_bwd(Y, f(B, I), f(E, O, I), f(0)),
    "bwd_saved_short": lambda n: native_bwd(Y, f(B, I), f(E, O, I), f(E, B - 1, O)),
    "bwd_saved_dtype": lambda n: native_bwd(Y, f(B, I), f(E, O, I), Y.half()),
    "bwd_x": lambda n: native_bwd(Y, f(B + 1, I), f(E, O, I), Y),
    "bwd_weight_2d": lambda n: native_bwd(Y, f(B, I), f(O, I), Y),
    "bwd_activation": lambda n: native_bwd(Y, f(B, I), f(E, O, I), Y, code=9),
    "set_isa": lambda n: n.cpu_set_isa("sse9"),
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_calls_of_the_extension(name):
    """The schemas can be called by anyone: nonsense raises instead of reading beyond a tensor."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        DIRECT[name](_native.ops)


def test_activation_codes_of_python_and_cpp_agree(seed):
    from effens_kernels.ops._activations import ACTIVATIONS

    assert sorted(a.code for a in ACTIVATIONS.values()) == list(range(len(ACTIVATIONS)))
    x, weight, bias = CASE.inputs_for(torch.float64, seed=seed)
    z = reference.grouped_linear(x, weight, bias)
    for activation in ACTIVATIONS.values():
        y, saved = _native.ops.grouped_linear_fwd(x, weight, bias, activation.code, True)
        torch.testing.assert_close(y, activation.apply(z), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(saved, z, rtol=1e-12, atol=1e-12)
