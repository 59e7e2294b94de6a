"""ensemble_mlp refuses bad input in the same words on every route: op, argument, what was expected and what came."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest
import torch
from bad_input import f
from torch import Tensor

from effens_kernels import _native, ensemble_mlp

E, B, I, H, O = 3, 5, 7, 6, 4


X, W0, W1, B0, B1 = f(E, B, I), f(E, H, I), f(E, O, H), f(E, H), f(E, O)
W = [W0, W1]
int64, half, double, meta = ({"dtype": torch.int64}, {"dtype": torch.half}, {"dtype": torch.double}, {"device": "meta"})

# name: (arguments, error, argument that is named, words that must be there)
BAD = {
    "x_list": (([[1.0]], W), TypeError, "x", "torch.Tensor"),
    "x_none": ((None, W), TypeError, "x", "torch.Tensor"),
    "x_array": ((numpy.zeros((B, I)), W), TypeError, "x", "torch.Tensor"),
    "x_0d": ((f(), W), ValueError, "x", "[B, I] or [E, B, I]"),
    "x_1d": ((f(I), W), ValueError, "x", "got float32[7]"),
    "x_4d": ((f(1, E, B, I), W), ValueError, "x", "got float32[1, 3, 5, 7]"),
    "x_4d_of_ones": ((f(1, 1, 1, I), [f(1, H, I), f(1, O, H)]), ValueError, "x", "got float32[1, 1, 1, 7]"),
    "x_inputs": ((f(B, I + 1), W), ValueError, "x", "I=7] to fit weights[0] [3, 6, 7]"),
    "x_inputs_1": ((f(E, B, 1), W), ValueError, "x", "I=7] to fit weights[0] [3, 6, 7]"),
    "x_members": ((f(E + 1, B, I), W), ValueError, "weights[0]", "[E=4, O, I] as x [4, 5, 7], or [1, O, I]"),
    "x_one_member": ((f(1, B, I), W), ValueError, "weights[0]", "[E=1, O, I] as x [1, 5, 7]"),
    "x_no_member": ((f(0, B, I), W), ValueError, "weights[0]", "[E=0, O, I] as x [0, 5, 7]"),
    "x_int": ((f(B, I, **int64), W), TypeError, "x", "int64"),
    "x_complex": ((f(B, I, dtype=torch.complex64), W), TypeError, "x", "complex64"),
    "x_double": ((f(B, I, **double), W), TypeError, "weights[0]", "torch.float64 like x"),
    "x_meta": ((f(B, I, **meta), W), ValueError, "weights[0]", "on meta like x"),
    "x_sparse": ((f(B, I).to_sparse(), W), TypeError, "x", "sparse"),
    "weights_none": ((X, None), TypeError, "weights", "a list or tuple of tensors"),
    "weights_tensor": ((X, W0), TypeError, "weights", "a list or tuple of tensors"),
    "weights_generator": ((X, iter(W)), TypeError, "weights", "a list or tuple of tensors"),
    "weights_dict": ((X, dict(enumerate(W))), TypeError, "weights", "a list or tuple of tensors"),
    "no_layers": ((X, []), ValueError, "weights", "at least one layer"),
    "weight_none": ((X, [W0, None]), TypeError, "weights[1]", "torch.Tensor"),
    "weight_number": ((X, [3.0, W1]), TypeError, "weights[0]", "torch.Tensor"),
    "weight_list": ((X, [W0, [W1]]), TypeError, "weights[1]", "torch.Tensor"),
    "weight_0d": ((X, [f(), W1]), ValueError, "weights[0]", "[E, O, I]"),
    "weight_2d": ((X, [W0, f(O, H)]), ValueError, "weights[1]", "[E, H, O, I], got float32[4, 6]"),
    "heads_do_not_chain": ((X, [W0, f(E, 2, O, I)]), ValueError, "weights[1]", "I=6] to follow weights[0] [3, 6, 7]"),
    "heads_members": ((X, [W0, f(2, 2, O, H)]), ValueError, "weights[1]", "[E=3, O, I] as x [3, 5, 7]"),
    "heads_bias_flat": (
        (X, [W0, f(E, 2, O, H)], [B0, f(E, 2 * O)]),
        ValueError,
        "biases[1]",
        "[3, 2, 4] as weights[1]",
    ),
    "heads_bias_3d": ((X, W, [B0, f(E, 2, O)]), ValueError, "biases[1]", "[3, O=4] as weights[1]"),
    "weight_4d": ((X, [f(E, 2, H, I), W1]), ValueError, "weights[0]", "[E, O, I], got float32[3, 2, 6, 7]"),
    "weights_do_not_chain": (
        (X, [W0, f(E, O, H + 1)]),
        ValueError,
        "weights[1]",
        "I=6] to follow weights[0] [3, 6, 7]",
    ),
    "weights_transposed": ((X, [W0, f(E, H, O)]), ValueError, "weights[1]", "I=6] to follow weights[0]"),
    "third_does_not_chain": ((X, [*W, f(E, 2, H)]), ValueError, "weights[2]", "I=4] to follow weights[1] [3, 4, 6]"),
    "weights_of_1_do_not_chain": ((X, [f(E, 1, I), W1]), ValueError, "weights[1]", "I=1] to follow weights[0]"),
    "members_differ": ((f(B, I), [W0, f(E + 1, O, H)]), ValueError, "weights[1]", "E=3, O, I] as weights[0] [3, 6, 7]"),
    "members_differ_after_shared": (
        (f(B, I), [f(1, H, I), f(E, H, H), f(2, O, H)]),
        ValueError,
        "weights[2]",
        "[E=3, O, I] as weights[1] [3, 6, 6], or [1, O, I]",
    ),
    "weight_int": ((X, [W0, f(E, O, H, **int64)]), TypeError, "weights[1]", "int64"),
    "weight_complex": ((X, [f(E, H, I, dtype=torch.cfloat), W1]), TypeError, "weights[0]", "complex64"),
    "weight_half": ((X, [W0, f(E, O, H, **half)]), TypeError, "weights[1]", "torch.float32 like x"),
    "weight_double": ((X, [f(E, H, I, **double), W1]), TypeError, "weights[0]", "torch.float32 like x"),
    "weight_meta": ((X, [W0, f(E, O, H, **meta)]), ValueError, "weights[1]", "on cpu like x"),
    "weight_sparse": ((X, [f(E, H, I).to_sparse(), W1]), TypeError, "weights[0]", "sparse"),
    "biases_tensor": ((X, W, B0), TypeError, "biases", "None or a list or tuple"),
    "biases_false": ((X, W, False), TypeError, "biases", "None or a list or tuple"),
    "too_few_biases": ((X, W, [B0]), ValueError, "biases", "2, one per weight, got 1"),
    "no_biases": ((X, W, []), ValueError, "biases", "2, one per weight, got 0"),
    "too_many_biases": ((X, W, [B0, B1, None]), ValueError, "biases", "2, one per weight, got 3"),
    "bias_number": ((X, W, [B0, 0.0]), TypeError, "biases[1]", "torch.Tensor"),
    "bias_1d": ((X, W, [f(H), B1]), ValueError, "biases[0]", "[3, O=6] as weights[0] [3, 6, 7]"),
    "bias_3d": ((X, W, [B0, f(E, 1, O)]), ValueError, "biases[1]", "[3, O=4] as weights[1] [3, 4, 6]"),
    "bias_outputs": ((X, W, [B0, f(E, O + 1)]), ValueError, "biases[1]", "[3, O=4] as weights[1]"),
    "bias_outputs_1": ((X, W, [B0, f(E, 1)]), ValueError, "biases[1]", "[3, O=4] as weights[1]"),
    "bias_members_1": ((X, W, [f(1, H), B1]), ValueError, "biases[0]", "[3, O=6] as weights[0]"),
    "bias_members_of_shared": ((X, [f(1, H, I), W1], [B0, B1]), ValueError, "biases[0]", "[1, O=6] as weights[0]"),
    "biases_swapped": ((X, W, [B1, B0]), ValueError, "biases[0]", "[3, O=6] as weights[0]"),
    "bias_int": ((X, W, [B0, f(E, O, **int64)]), TypeError, "biases[1]", "int64"),
    "bias_half": ((X, W, [f(E, H, **half), B1]), TypeError, "biases[0]", "torch.float32 like x"),
    "bias_meta": ((X, W, [None, f(E, O, **meta)]), ValueError, "biases[1]", "on cpu like x"),
    "bias_sparse": ((X, W, [None, f(E, O).to_sparse()]), TypeError, "biases[1]", "sparse"),
}
EMULATED = ["cuda"] * _native.emulates_cuda
backends = pytest.mark.parametrize("backend", [None, "cpu", *EMULATED, "reference"])


def trained(values):
    """The same arguments as a training step has them."""
    if isinstance(values, (list, tuple)):
        return type(values)(map(trained, values))
    if isinstance(values, Tensor) and values.is_floating_point() and values.layout is torch.strided:
        return values.detach().requires_grad_()
    return values


@backends
@pytest.mark.parametrize("training", [False, True], ids=["plain", "training"])
@pytest.mark.parametrize(("arguments", "error", "argument", "words"), BAD.values(), ids=BAD)
def test_bad_tensors(arguments, error, argument, words, training, backend):
    with pytest.raises(error) as raised:
        ensemble_mlp(*(trained(arguments) if training else arguments), backend=backend)
    message = str(raised.value)
    assert message.startswith(f"ensemble_mlp: {argument} should be "), message
    assert ", got " in message, message
    assert words in message, message
    assert type(raised.value) is error


@backends
@pytest.mark.parametrize("name", ["activation", "out_activation"])
@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize(
    "value",
    ["Relu", "sigmoid", "", 1, True, torch.relu, ["relu"], {}],
    ids=lambda a: getattr(a, "__name__", None) or repr(a),
)
def test_unknown_activation(value, name, shared_trunk, backend):
    weights = [f(1, H, I), W1] if shared_trunk else W
    with pytest.raises(ValueError, match=rf"ensemble_mlp: {name} should be one of None, 'relu', 'gelu'") as raised:
        ensemble_mlp(f(B, I), weights, backend=backend, **{name: value})
    assert f"got {value!r}" in str(raised.value)


@pytest.mark.parametrize(
    "backend", ["CPU", "mkl", "", 1, ["cpu"]], ids=lambda a: getattr(a, "__name__", None) or repr(a)
)
def test_unknown_backend(backend):
    with pytest.raises(ValueError, match="ensemble_mlp: backend should be None or one of 'reference', 'cpu'") as raised:
        ensemble_mlp(X, W, backend=backend)
    assert f"got {backend!r}" in str(raised.value)


def test_backends_that_cannot_run():
    for backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"'{backend}' cannot run this call: ensemble_mlp has no float64 kernel"):
            ensemble_mlp(X.double(), [w.double() for w in W], backend=backend)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: the tensors are on meta"):
        ensemble_mlp(X.to("meta"), [w.to("meta") for w in W], backend="cpu")


def test_options_are_named():
    with pytest.raises(TypeError):
        ensemble_mlp(X)
    with pytest.raises(TypeError):
        ensemble_mlp(X, W, None, "relu")


# -------------------------------------------------------------------- the engine refuses whatever the words are for


def variants(t: Tensor) -> list:
    """What may stand where `t` should: other sizes, ranks, dtypes, devices, layouts, and no tensors."""
    sizes = list(t.shape)
    shapes = [[*sizes[:d], size, *sizes[d + 1 :]] for d in range(t.dim()) for size in (0, 1, 2, sizes[d] + 1)]
    shapes += [[*sizes[:d], *more, *sizes[d:]] for d in range(t.dim() + 1) for more in ([1], [E])]
    shapes += [[*sizes[:d], *sizes[d + 1 :]] for d in range(t.dim())] + [[]]
    return [
        *(torch.randn(shape) for shape in shapes),
        *(t.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.double, torch.half)),
        t.to("meta"),
        t.to_sparse(),
        t.to_mkldnn(),
        torch.complex(t, t).conj().imag,
        torch._efficientzerotensor(sizes),
        None,
        1.0,
        t.tolist(),
    ]


def outcome(arguments, backend, options):
    try:
        return ensemble_mlp(*arguments, **options, backend=backend)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("copies", list(itertools.product((E, 1), repeat=2)), ids=str)
@pytest.mark.parametrize("training", ["nothing", "all", "some"])
def test_every_route_accepts_the_same(shared, copies, training, seed):
    """The engine checks for itself on the short route; it must take what the words are for and nothing else."""
    choice = random.Random(seed)
    first, second = copies
    good = [
        torch.randn(B, I) if shared else torch.randn(E, B, I),
        torch.randn(first, H, I),
        torch.randn(second, O, H),
        torch.randn(first, H),
        torch.randn(second, O),
    ]
    for position, t in enumerate(good):
        for value in variants(t):
            given = [*good[:position], value, *good[position + 1 :]]
            if training != "nothing":
                given = [trained(g) if training == "all" or choice.random() < 0.5 else g for g in given]
            arguments = given[0], given[1:3], given[3:]
            options = {
                "activation": choice.choice([None, "relu", "gelu"]),
                "out_activation": choice.choice([None, "tanh"]),
            }
            expected = outcome(arguments, "reference", options)
            for backend in ("cpu", *EMULATED, None):
                actual = outcome(arguments, backend, options)
                if isinstance(expected, Tensor):
                    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
                else:
                    assert actual == expected


# ------------------------------------------------------------------------------------ the C++ checks behind the op

NONE = [None, None]
Y, HIDDEN = f(E, B, O), f(E * B * H)
fwd = {
    "x_1d": (f(I), W, NONE, 1, 0, True),
    "x_4d": (f(1, E, B, I), W, NONE, 1, 0, True),
    "no_layers": (X, [], [], 1, 0, True),
    "weight_2d": (X, [W0, f(O, H)], NONE, 1, 0, False),
    "widths": (X, [W0, f(E, O, H + 1)], NONE, 1, 0, False),
    "inputs": (f(E, B, I - 1), W, NONE, 1, 0, False),
    "members": (f(E + 1, B, I), W, NONE, 1, 0, False),
    "members_of_layers": (f(B, I), [W0, f(2, O, H)], NONE, 1, 0, False),
    "shared_first_layer_of_shared_rows": (f(B, I), [f(1, H, I), W1], NONE, 1, 0, False),
    "too_few_biases": (X, W, [B0], 1, 0, True),
    "too_many_biases": (X, W, [B0, B1, B1], 1, 0, True),
    "bias_short": (X, W, [B0, f(E, O - 1)], 1, 0, True),
    "bias_1d": (X, W, [f(H), None], 1, 0, True),
    "bias_of_all_members_for_a_shared_layer": (X, [f(1, H, I), W1], [B0, None], 1, 0, True),
    "bias_dtype": (X, W, [B0.double(), None], 1, 0, True),
    "weight_dtype": (X, [W0, W1.half()], NONE, 1, 0, True),
    "int": (X.long(), [w.long() for w in W], NONE, 1, 0, True),
    "activation": (X, W, NONE, 5, 0, True),
    "out_activation": (X, W, NONE, 1, -1, True),
    "meta": (X, [W0, W1.to("meta")], NONE, 1, 0, True),
    "sparse": (X, [W0, W1.to_sparse()], NONE, 1, 0, True),
}
bwd = {
    "grad_short": (f(E, B, O - 1), X, W, Y, HIDDEN, 1, 0, True),
    "grad_2d": (f(B, O), X, W, Y, HIDDEN, 1, 0, True),
    "grad_dtype": (Y.double(), X, W, Y, HIDDEN, 1, 0, True),
    "y_short": (Y, X, W, f(E, B, O - 1), HIDDEN, 1, 4, True),
    "y_dtype": (Y, X, W, Y.half(), HIDDEN, 1, 4, True),
    "hidden_short": (Y, X, W, Y, HIDDEN[1:], 1, 0, True),
    "hidden_without_z": (Y, X, W, Y, HIDDEN, 2, 0, True),
    "hidden_without_last_z": (Y, X, W, Y, HIDDEN, 1, 3, True),
    "hidden_2d": (Y, X, W, Y, HIDDEN.view(1, -1), 1, 0, True),
    "hidden_stepped": (Y, X, W, Y, f(2 * E * B * H)[::2], 1, 0, True),
    "hidden_dtype": (Y, X, W, Y, HIDDEN.half(), 1, 0, True),
    "x_rows": (Y, f(E, B + 1, I), W, Y, HIDDEN, 1, 0, True),
    "widths": (Y, X, [W0, f(E, O, H + 1)], Y, HIDDEN, 1, 0, True),
    "activation": (Y, X, W, Y, HIDDEN, 9, 0, True),
}


@pytest.mark.parametrize("name", [*(f"fwd-{name}" for name in fwd), *(f"bwd-{name}" for name in bwd)])
def test_direct_calls_of_the_extension(name):
    """The schemas can be called by anyone: nonsense raises instead of reading beyond a tensor."""
    direction, _, case = name.partition("-")
    call, arguments = {
        "fwd": lambda: (_native.ops.ensemble_mlp_fwd, fwd[case]),
        "bwd": lambda: (_native.ops.ensemble_mlp_bwd, bwd[case]),
    }[direction]()
    with pytest.raises((RuntimeError, NotImplementedError)):
        call(*arguments)
