"""The CUDA C++ kernels of ensemble_mlp: every tile and type, as tests/test_cuda_kernels.py does for their parts."""

from __future__ import annotations

import os

import pytest
import torch
from common import Named, Runner, name_of, run_python
from mlp_cases import Inputs, MLPCase, chain, gradients
from torch import Tensor

import effens_kernels as ek
from effens_kernels import _dispatch, _native
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.ensemble_mlp import autograd, reference
from effens_kernels.testing import assert_accurate, error

RUNNER = Runner("cuda")
if RUNNER.why_not() is not None:
    pytest.skip(RUNNER.why_not(), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {0: "small", 1: "medium", 2: "large"}


def run(
    case: MLPCase, inputs: Inputs, grad: Tensor, tile: int = -1, tf32: bool = False, need_x: bool = True
) -> tuple[Named, Tensor]:
    """Forward and backward through the schemas, named as by `gradients`; what forward saves."""
    codes = ACTIVATIONS[case.activation].code, ACTIVATIONS[case.out_activation].code
    x, weights, biases = inputs.x, inputs.weights, inputs.biases
    y, hidden = _native.cuda_ops.ensemble_mlp_fwd(x, weights, biases, *codes, True, tf32, tile)
    found = _native.cuda_ops.ensemble_mlp_bwd(grad, x, weights, y, hidden, *codes, need_x, tf32, tile)
    names = ["x", *(f"{kind}[{n}]" for kind in ("weights", "biases") for n in range(case.depth))]
    given = inputs.tensors()
    return {"y": y, **{name: g for name, g in zip(names, found, strict=True) if name in given}}, hidden


def calls(cases: list[MLPCase], dtypes: tuple[torch.dtype, ...] = DTYPES) -> list:
    """(case, tile, dtype): but for the large tile where a block has no room for so many values of 32 bits."""
    return [
        pytest.param(case, tile, dtype, id=f"{case}-{TILES[tile]}-{name_of(dtype)}")
        for case in cases
        for tile in TILES
        for dtype in dtypes
        if TILES[tile] != "large" or dtype != torch.float32 or max(case.widths[1:]) <= 70
    ]


def sample(case: MLPCase, dtype: torch.dtype, seed: int) -> tuple[Inputs, Tensor]:
    inputs = case.inputs_for(dtype, RUNNER.device, seed)
    return inputs, case.grad_for(inputs.x, seed + 1)


def exact(case: MLPCase, inputs: Inputs, grad: Tensor) -> Named:
    return gradients(reference.ensemble_mlp, inputs.map(Tensor.double), grad.double(), **case.options)


# Rows and widths of less than a tile and of several, whose last is nearly empty; 8, 40 and 64 take loads and stores of
# 16 bytes, the others do not.  300 inputs stream past, fewer come to shared memory at once, and of 100 it depends.
SMOOTH = [
    MLPCase(2, 37, (5, 3), None),
    MLPCase(2, 130, (40, 64, 64, 8), "gelu", "tanh"),
    MLPCase(3, 65, (17, 33, 2), "tanh"),
    MLPCase(2, 33, (300, 70, 1), "silu", "silu", shared=True),
    MLPCase(2, 40, (100, 7, 130, 256, 3), "tanh", bias="some"),
    MLPCase(1, 129, (1, 256, 129), "gelu", "gelu", bias="none"),
    MLPCase(3, 20, (16, 24, 40, 24), "silu", "tanh", shared_layers=(1,)),
    MLPCase(3, 20, (9, 24, 5), "gelu", "silu", shared_layers=(0, 1)),
    MLPCase(2, 70, (17, 33, 40, 24, 64, 33, 48, 33, 17), "silu"),
    MLPCase(2, 40, (40, 24, 16), "tanh", x_layout="transposed", weight_layout="inner"),
    MLPCase(2, 40, (40, 24, 16), "tanh", x_layout="inner", weight_layout="stepped"),
    MLPCase(2, 24, (40, 48, 16), "tanh", x_layout="offset", weight_layout="offset"),
    MLPCase(2, 24, (300, 16, 8), "tanh", x_layout="stepped", shared=True),
]
KINKED = [
    MLPCase(2, 70, (300, 64, 130, 5), "relu"),
    MLPCase(3, 33, (17, 8, 8), "relu", "relu", shared=True),
    MLPCase(2, 20, (9, 8, 7, 6, 5, 4, 3, 2, 1), "relu", "gelu", bias="some"),
]


@pytest.mark.parametrize(("case", "tile", "dtype"), calls(SMOOTH))
def test_every_tile(case, tile, dtype, session_seed):
    inputs, grad = sample(case, dtype, session_seed)
    expected = exact(case, inputs, grad)
    composition = gradients(reference.ensemble_mlp, inputs, grad, **case.options)
    actual, _ = run(case, inputs, grad, tile)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_accurate(value, expected[name], composition[name], name, case.terms(name))
    assert actual["x"].stride() == torch.empty_like(inputs.x).stride()


@pytest.mark.parametrize(("case", "tile", "dtype"), calls([c for c in [*SMOOTH, *KINKED] if not c.shared_layers]))
def test_the_bits_of_the_chain(case, tile, dtype, session_seed):
    """The same sums in the same order; where layers are shared, rows of members would meet in a step of the chain."""
    inputs, grad = sample(case, dtype, session_seed)
    expected = gradients(chain, inputs, grad, **case.options, backend="cuda")
    for name, value in run(case, inputs, grad, tile)[0].items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("case", "tile", "dtype"), calls(SMOOTH, DTYPES[:1]))
def test_tf32(case, tile, dtype, session_seed):
    inputs, grad = sample(case, dtype, session_seed)
    expected = exact(case, inputs, grad)
    actual, _ = run(case, inputs, grad, tile, tf32=True)
    for name, value in actual.items():
        assert error(value, expected[name]) < 2e-2, name
    assert error(actual["y"], expected["y"]) > 1e-5, "not rounded to TF32"


def test_tf32_follows_torchs_setting(seed):
    case = MLPCase(2, 20, (40, 24, 8), "tanh")
    inputs, grad = sample(case, torch.float32, seed)
    expected = exact(case, inputs, grad)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, rounded in (("ieee", False), ("tf32", True)):
            torch.backends.cuda.matmul.fp32_precision = setting
            actual = gradients(ek.ensemble_mlp, inputs, grad, **case.options, backend="cuda")
            for name in ("y", "x", "weights[0]", "weights[1]"):
                assert (error(actual[name], expected[name]) > 1e-5) == rounded
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_tile_without_room_is_an_error_and_not_chosen(seed):
    case = MLPCase(1, 500, (256, 256, 256), "gelu")
    inputs, _ = sample(case, torch.float32, seed)
    call = inputs.x, inputs.weights, inputs.biases, 2, 0, True, False
    with pytest.raises(RuntimeError, match="too little shared memory for the tile"):
        _native.cuda_ops.ensemble_mlp_fwd(*call, 2)
    assert torch.equal(_native.cuda_ops.ensemble_mlp_fwd(*call)[0], _native.cuda_ops.ensemble_mlp_fwd(*call, 0)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("depth", range(1, 9))
def test_every_depth(depth, dtype, seed):
    case = MLPCase(2, 19, (6, 9, 16, 3, 70, 5, 8, 33, 4)[: depth + 1], "gelu", "tanh")
    inputs, grad = sample(case, dtype, seed)
    expected = gradients(chain, inputs, grad, **case.options, backend="cuda")
    for name, value in run(case, inputs, grad)[0].items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(6, 4), (6, 9, 4), (6, 9, 8, 4)], ids=str)
def test_what_is_saved(activation, out_activation, widths, seed):
    """Hidden outputs, and pre-activations where the slope is a function of those."""
    case = MLPCase(3, 5, widths, activation, out_activation)
    inputs, grad = sample(case, torch.float32, seed)
    actual, hidden = run(case, inputs, grad)

    def up(n: int) -> int:
        return -(-case.members * case.batch * n // 8) * 8

    y, z, layer = inputs.x, [], []
    for n, (weight, bias) in enumerate(zip(inputs.weights, inputs.biases)):
        last = n + 1 == case.depth
        act = ACTIVATIONS[out_activation if last else activation]
        before = y @ weight.mT + bias.unsqueeze(1)
        y = act.apply(before)
        layer += [] if last else [y]
        z += [before] if act.saves == "preactivation" else []
    at = 0
    for wanted in (*layer, *z):
        found = hidden[at : at + wanted.numel()].view_as(wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        at += up(wanted.shape[-1])
    assert at == hidden.numel()
    torch.testing.assert_close(actual["y"], y, rtol=1e-5, atol=1e-5)
    codes = ACTIVATIONS[activation].code, ACTIVATIONS[out_activation].code
    y, nothing = _native.cuda_ops.ensemble_mlp_fwd(inputs.x, inputs.weights, inputs.biases, *codes, False, False)
    assert torch.equal(y, actual["y"])
    assert nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("depth", [1, 2])
def test_without_the_gradient_of_x(depth, shared, dtype, seed):
    case = MLPCase(3, 20, (33, 18, 7)[: depth + 1], "tanh", "gelu", shared=shared)
    inputs, grad = sample(case, dtype, seed)
    every, some = (run(case, inputs, grad, need_x=need)[0] for need in (True, False))
    assert some.pop("x").numel() == 0
    assert all(torch.equal(value, every[name]) for name, value in some.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_the_same_bits_again(tile, dtype, seed):
    case = MLPCase(3, 70, (50, 66, 33, 5), "gelu", "silu", shared=True, shared_layers=(1,))
    inputs, grad = sample(case, dtype, seed)
    first, second = (run(case, inputs, grad, tile)[0] for _ in range(2))
    assert all(map(torch.equal, first.values(), second.values()))


GRADS = {
    "one_value": lambda g: g[:1, :1, :1].expand(g.shape),
    "one_row": lambda g: g[:, :1].expand(g.shape),
    "batch_first": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "inner": lambda g: g.mT.contiguous().mT,
    "stepped": lambda g: torch.stack((g, g), -1).flatten(-2)[..., 1::2],
}


@pytest.mark.parametrize("layout", GRADS)
@pytest.mark.parametrize("out_activation", [None, "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_strides_of_the_gradient(layout, out_activation, dtype, seed):
    case = MLPCase(3, 40, (21, 16, 24), "tanh", out_activation)
    inputs, grad = sample(case, dtype, seed)
    grad = GRADS[layout](grad)
    expected, _ = run(case, inputs, grad.contiguous())
    for name, value in run(case, inputs, grad)[0].items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_values_that_are_not_finite_stay_in_their_row_and_member(value, dtype, seed):
    """Rows past the last and columns past a width are zeros that nothing touches; the row itself is as of the chain."""
    case = MLPCase(3, 70, (17, 33, 64, 5), "tanh")
    inputs, grad = sample(case, dtype, seed)
    expected, _ = run(case, inputs, grad)
    inputs.x[1, 37, 2], grad[2, 69, 4] = value, value
    actual, _ = run(case, inputs, grad)
    assert not actual["x"][2, 69].isfinite().all()
    layers = gradients(chain, inputs, grad, **case.options, backend="cuda")
    for name, found in actual.items():
        torch.testing.assert_close(found, layers[name], rtol=1e-2, atol=1e-2, equal_nan=True, msg=name)
    for name, row in (("y", (1, 37)), ("x", (1, 37)), ("x", (2, 69))):
        expected[name][row] = actual[name][row] = 0
    assert torch.equal(actual["y"], expected["y"])
    assert torch.equal(actual["x"], expected["x"])
    assert all(torch.equal(actual[name][0], expected[name][0]) for name in inputs.tensors() if name != "x")


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["per_member", "shared"])
@pytest.mark.parametrize("shared_layers", [(), (1,)], ids=["own", "head_shared"])
def test_no_members_and_no_rows(sizes, shared, shared_layers, seed):
    case = MLPCase(*sizes, (3, 5, 2), "gelu", "tanh", shared, shared_layers)
    inputs, grad = sample(case, torch.float32, seed)
    expected = gradients(reference.ensemble_mlp, inputs, grad, **case.options)
    for name, value in run(case, inputs, grad)[0].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_members_and_rows_further_apart_than_32_bits_reach(seed):
    case = MLPCase(2, 3, (24, 8, 5), "tanh")
    inputs, grad = sample(case, torch.bfloat16, seed)
    storage = torch.empty(2**32 + 2**30, dtype=torch.bfloat16, device=RUNNER.device)  # of which few pages are touched
    far = storage.as_strided(inputs.x.shape, (2**31 + 64, 2**30 + 8, 1)).copy_(inputs.x)
    near, _ = run(case, inputs, grad)
    assert all(map(torch.equal, run(case, Inputs(far, inputs.weights, inputs.biases), grad)[0].values(), near.values()))


# ------------------------------------------------------------------------------------------------------ which route


def routes(case: MLPCase, monkeypatch, seed: int, trained: bool = True) -> set[str]:
    """What a call and its backward go through: the kernels of all layers ("mlp"), layer by layer ("chain")."""
    found = set()

    def spy(owner, name, route):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (found.add(route), call(*given))[1])

    spy(autograd.cuda, "fwd", "mlp")
    spy(autograd.cuda, "bwd", "mlp")
    spy(autograd, "chain", "chain")
    inputs, grad = sample(case, torch.float32, seed)
    inputs = inputs.leaves() if trained else inputs
    y = ek.ensemble_mlp(inputs.x, inputs.weights, inputs.biases, **case.options, backend="cuda")
    if trained:
        y.backward(grad)
    return found


@pytest.mark.parametrize("trained", [False, True], ids=["plain", "training"])
@pytest.mark.parametrize(
    ("widths", "route"),
    [
        ((8, 64, 64, 64, 4), "mlp"),
        ((3000, 256, 1), "mlp"),
        ((8,) * 9, "mlp"),
        ((8,) * 10, "chain"),
        ((8, 257, 4), "chain"),
        ((8, 4, 257), "chain"),
        ((8, 0, 4), "chain"),
        ((0, 4), "chain"),
    ],
    ids=str,
)
def test_which_layers_are_one_launch(widths, route, trained, monkeypatch, seed):
    case = MLPCase(2, 3, widths, "tanh")
    assert routes(case, monkeypatch, seed, trained) == {route}
    assert _dispatch.takes_mlp(widths, torch.float32, torch.device("cpu")) == (route == "mlp")


@pytest.mark.parametrize(("width", "dtype", "route"), [(256, 4, "chain"), (128, 4, "mlp"), (256, 2, "mlp")], ids=str)
def test_on_a_gpu_of_less_shared_memory(width, dtype, route, monkeypatch, seed):
    """99 KiB a block, as of compute capability 8.6, 8.9 and 12.0."""
    monkeypatch.setattr(_dispatch, "shared_memory", lambda _: 99 << 10)
    kind = {4: torch.float32, 2: torch.bfloat16}[dtype]
    assert _dispatch.takes_mlp((8, width, 4), kind, torch.device("cpu")) == (route == "mlp")
    if dtype == 4:
        assert routes(MLPCase(2, 3, (8, width, width, 4), "tanh"), monkeypatch, seed) == {route}


def test_a_shared_trunk_goes_first(monkeypatch, seed):
    """Rows that all members share go through it once."""
    case = MLPCase(3, 20, (9, 24, 16, 5), "tanh", shared=True, shared_layers=(0, 1))
    shapes = []
    fwd = autograd.cuda.fwd
    monkeypatch.setattr(autograd.cuda, "fwd", lambda x, *rest: (shapes.append(tuple(x.shape)), fwd(x, *rest))[1])
    inputs, grad = sample(case, torch.float32, seed)
    actual = gradients(ek.ensemble_mlp, inputs, grad, **case.options, backend="cuda")
    assert shapes == [(20, 9), (20, 16)]
    expected = gradients(chain, inputs, grad, **case.options, backend="cuda")
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["x", "weights[0]", "biases[1]"])
def test_frozen_layers_take_the_chain(wanted, seed):
    case = MLPCase(3, 20, (9, 24, 5), "gelu", "tanh")
    inputs, grad = sample(case, torch.float32, seed)
    leaf = inputs.tensors()[wanted].requires_grad_()
    y = ek.ensemble_mlp(inputs.x, inputs.weights, inputs.biases, **case.options, backend="cuda")
    (found,) = torch.autograd.grad(y, leaf, grad)
    expected = gradients(chain, inputs, grad, **case.options, backend="cuda")
    assert torch.equal(found, expected[wanted])


def test_second_derivatives(seed):
    case = MLPCase(2, 9, (4, 6, 3), "tanh", "silu")
    inputs, _ = sample(case, torch.float32, seed)
    results = []
    for backend in ("cuda", "reference"):
        given = inputs.leaves()
        named = list(given.tensors().values())
        y = ek.ensemble_mlp(given.x, given.weights, given.biases, **case.options, backend=backend)
        first = torch.autograd.grad(y.pow(2).sum(), named, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), named))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_bad_calls_of_the_schema():
    def f(*size: int) -> Tensor:
        return torch.zeros(size, device=RUNNER.device)

    x, weights, biases = f(2, 3, 4), [f(2, 5, 4), f(2, 6, 5)], [None, None]
    fwd, bwd = _native.cuda_ops.ensemble_mlp_fwd, _native.cuda_ops.ensemble_mlp_bwd
    how = 1, 0, True, False
    for arguments, words in [
        ((x, [], [], *how), "takes 1 to 8 layers, got 0"),
        ((x, [f(2, 4, 4)] * 9, [None] * 9, *how), "takes 1 to 8 layers, got 9"),
        ((x[0, 0], weights, biases, *how), "x should be"),
        ((x[None], weights, biases, *how), "x should be"),
        ((x[..., :0], weights, biases, *how), "at least one input"),
        ((x, [f(5, 4), weights[1]], biases, *how), "weights should be"),
        ((x, [weights[0], f(6, 5)], biases, *how), "members"),
        ((x, [weights[0], f(3, 6, 5)], biases, *how), "members"),
        ((x[0], [f(1, 5, 4), weights[1]], biases, *how), "members"),
        ((x[..., 1:], weights, biases, *how), "weight does not fit"),
        ((x, [weights[0], f(2, 6, 4)], biases, *how), "weight does not fit"),
        ((x, [weights[0], weights[1].half()], biases, *how), "weight does not fit"),
        ((x, [weights[0], f(2, 0, 5)], biases, *how), "widths should be"),
        ((x, [weights[0], f(2, 257, 5)], biases, *how), "widths should be"),
        ((x, weights, [None], *how), "one bias or None per weight"),
        ((x, weights, [None, f(2, 5)], *how), "bias does not fit"),
        ((x, weights, [f(5), None], *how), "bias does not fit"),
        ((x, weights, biases, 9, 0, True, False), "unknown activation code 9"),
        ((x, weights, biases, 0, -1, True, False), "unknown activation code -1"),
        ((x, weights, biases, *how, 3), "tile should be"),
        ((x.double(), [w.double() for w in weights], biases, *how), "take float32"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            fwd(*arguments)
    y, hidden = f(2, 3, 6), f(32)
    for arguments, words in [
        ((y[1:], x, weights, y, hidden, 1, 0, True, False), "grad does not fit"),
        ((y[..., 1:], x, weights, y, hidden, 1, 0, True, False), "grad does not fit"),
        ((y, x, weights, y.half(), hidden, 1, 0, True, False), "y does not fit"),
        ((y, x, weights, y, hidden[1:], 1, 0, True, False), "hidden does not fit"),
        ((y, x, weights, y, hidden, 2, 0, True, False), "hidden does not fit"),
        ((y, x, weights, y, f(64)[::2], 1, 0, True, False), "hidden should be contiguous"),
        ((y, x, weights, y, hidden, 1, 0, True, False, 3), "tile should be"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            bwd(*arguments)


@pytest.mark.skipif(not RUNNER.emulated, reason="the kernels run on a GPU, not in the emulation")
def test_results_do_not_depend_on_the_order_of_threads(seed):
    """A race that the emulation cannot see as such would show here."""
    code = (
        "import torch, hashlib; from effens_kernels import _native\n"
        f"torch.manual_seed({seed}); digest = hashlib.sha256()\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x, g = torch.randn(70, 36).to(dtype), torch.randn(2, 70, 7).to(dtype)\n"
        "    w = [torch.randn(s).to(dtype) / 6 for s in ((2, 34, 36), (1, 66, 34), (2, 7, 66))]\n"
        "    b = [torch.randn(*t.shape[:2]).to(dtype) for t in w]\n"
        "    for tile in range(3):\n"
        "        y, h = _native.cuda_ops.ensemble_mlp_fwd(x, w, b, 2, 3, True, False, tile)\n"
        "        for t in (y, *_native.cuda_ops.ensemble_mlp_bwd(g, x, w, y, h, 2, 3, True, False, tile)):\n"
        "            digest.update(t.float().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    library = os.environ["EFFENS_CUDA_EMULATION"]
    orders = "forward", "reverse", "1"
    runs = [run_python(code, EFFENS_CUDA_EMULATION=library, EFFENS_EMULATION_ORDER=order) for order in orders]
    assert all(r.returncode == 0 for r in runs), runs
    assert len({r.stdout for r in runs}) == 1
