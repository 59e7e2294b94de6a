"""rank1_mlp equals the float64 oracle and the chain of rank1_linear, forward and backward, on every route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from bad_input import assert_refused, f, forbid
from common import RUNNERS, Named, Runner, leaves, name_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from effens_kernels import _native, rank1_linear, rank1_mlp
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.rank1_mlp import autograd, reference
from effens_kernels.testing import DTYPES, assert_accurate, strided

Parameters = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]


@dataclass(frozen=True)
class Case:
    members: int
    batch: int
    widths: tuple[int, ...]  # I, hidden, O
    activation: str | None = "relu"
    out_activation: str | None = None
    shared: bool = False  # x is [B, I]
    bias: str = "own"  # of each member, "shared", "none", or "mixed": one of each kind after the other
    layout: str = "contiguous"

    def __str__(self) -> str:
        return "-".join(str(part) for part in vars(self).values())

    @property
    def options(self) -> dict[str, str | None]:
        return {"activation": self.activation, "out_activation": self.out_activation}

    def inputs_for(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Parameters]:
        """Scaled so that every layer's outputs are of order 1."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return strided(shape, self.layout if len(shape) > 1 else "contiguous", generator, dtype, device)

        rows = self.batch, self.widths[0]
        x = draw(*rows) if self.shared else draw(self.members, *rows)
        weights, r, s, biases = [], [], [], []
        for n, (i, o) in enumerate(zip(self.widths, self.widths[1:])):
            weights.append(draw(o, i).mul_((1 / max(1, i)) ** 0.5))
            r.append(draw(self.members, i).mul_(0.5).add_(1))
            s.append(draw(self.members, o).mul_(0.5).add_(1))
            kind = ("own", "shared", "none")[n % 3] if self.bias == "mixed" else self.bias
            biases.append({"own": draw(self.members, o), "shared": draw(o), "none": None}[kind])
        return x, (weights, r, s, biases)

    def terms(self, name: str) -> int:
        forward, backward = sum(self.widths[:-1]), sum(self.widths[1:])
        return forward if name == "y" else forward + (backward + self.batch) * self.members


NAMES = "weights", "r", "s", "biases"
CASES = [
    Case(3, 33, (17, 70), None, "gelu"),
    Case(3, 17, (33, 64, 17), "gelu", shared=True),
    Case(2, 70, (17, 33, 64, 33), "tanh", bias="mixed"),
    Case(5, 9, (64, 70, 33, 123, 17), "silu", bias="shared"),
    Case(2, 33, (33, 64, 17), None, None, bias="none"),
    Case(3, 33, (17, 33, 17), "gelu", "relu", layout="inner"),
    Case(3, 33, (17, 33, 17), "tanh", "silu", shared=True, layout="stepped"),
    *(Case(2, 33, (17, 33, 33), a, b) for a in ACTIVATIONS for b in ACTIVATIONS),
]
SMALL_CASES = [Case(1, 1, (1, 1)), Case(7, 2, (3, 3, 2)), Case(2, 1, (1, 3, 1), "tanh"), Case(3, 4, (5, 1, 2), "gelu")]
EMPTY_CASES = [
    Case(e, b, widths, "gelu", "tanh")
    for e, b, widths in ((0, 4, (3, 5, 2)), (2, 0, (3, 5, 2)), (2, 4, (0, 5, 2)), (2, 4, (3, 0, 2)), (2, 4, (3, 5, 0)))
]


def gradients(call: Callable[..., Tensor], x: Tensor, parameters: Parameters, grad: Tensor, **options) -> Named:
    """{"y": ..., "x": dL/dx, "weights[0]": ..., ...} for dL/dy = grad."""
    x, groups = leaves([x])[0], [leaves(group) for group in parameters]
    y = call(x, *groups, **options)
    named = {"x": x} | {
        f"{name}[{n}]": t for name, group in zip(NAMES, groups) for n, t in enumerate(group) if t is not None
    }
    return {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), grad)))}


def mapped(f: Callable[[Tensor], Tensor], x: Tensor, parameters: Parameters) -> tuple[Tensor, Parameters]:
    return f(x), tuple([None if t is None else f(t) for t in group] for group in parameters)


def chain(x, weights, r, s, biases, activation, out_activation, backend="cpu"):
    def linear(*call):
        return rank1_linear(*call[:-1], activation=call[-1], backend=backend)

    return reference.layers(linear, x, weights, r, s, biases, activation, out_activation)


def affordable(runner: Runner, case: Case, dtype: torch.dtype) -> bool:
    """Interpreted layers are rank1_linear's, which are tested there."""
    work = case.members * case.batch * max(case.widths)
    return dtype in runner.dtypes("rank1_linear") and (not runner.interpreted or (dtype == DTYPES[0] and work <= 400))


def calls(cases: list[Case]) -> list:
    return [
        pytest.param(case, dtype, runner, id=f"{case}-{name_of(dtype)}-{runner}")
        for case in cases
        for dtype in DTYPES
        for runner in RUNNERS
        if affordable(runner, case, dtype)
    ]


@lru_cache(maxsize=4)  # runners of one call follow each other
def sample(case: Case, dtype: torch.dtype, device: str, seed: int):
    x, parameters = case.inputs_for(dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = case.members, case.batch, case.widths[-1]
    grad = torch.randn(shape, generator=generator).to(x)
    wide = mapped(Tensor.double, x, parameters)
    exact = gradients(reference.rank1_mlp, *wide, grad.double(), **case.options)
    return x, parameters, grad, exact, gradients(reference.rank1_mlp, x, parameters, grad, **case.options)


@pytest.mark.parametrize(("case", "dtype", "runner"), calls(CASES), indirect=["runner"])
def test_values(case, dtype, runner, seed):
    """relu's gradients elsewhere than in float64 by the chain: rounding may change the sign of what is near 0."""
    x, parameters, grad, exact, composition = sample(case, dtype, runner.device, seed)
    actual = gradients(rank1_mlp, x, parameters, grad, **case.options, backend=runner.backend)
    kinked = "relu" in (case.activation, case.out_activation) and dtype != torch.float64
    assert actual.keys() == exact.keys()
    slack = 100 if dtype == torch.float64 else 4
    for name, value in actual.items():
        if name == "y" or not kinked:
            assert_accurate(value, exact[name], composition[name], name, slack * case.terms(name))


@pytest.mark.parametrize(("case", "dtype", "runner"), calls(CASES + SMALL_CASES + EMPTY_CASES), indirect=["runner"])
def test_same_bits_as_the_chain(case, dtype, runner, seed):
    x, parameters = case.inputs_for(dtype, runner.device, seed)
    grad = torch.randn(case.members, case.batch, case.widths[-1]).to(x)
    actual = gradients(rank1_mlp, x, parameters, grad, **case.options, backend=runner.backend)
    expected = gradients(chain, x, parameters, grad, **case.options, backend=runner.backend)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


DOUBLES = [
    Case(2, 3, (4, 3, 2), "gelu", bias="mixed"),
    Case(2, 3, (4, 3, 2), "tanh", "silu", shared=True),
    Case(2, 3, (3, 2), None, None, bias="shared"),
]
doubles = pytest.mark.parametrize("case", DOUBLES, ids=str)


def flat_call(case: Case, seed: int):
    """A function of all tensors, and those."""
    x, parameters = case.inputs_for(torch.float64, seed=seed)
    depth, without = len(case.widths) - 1, [t is None for group in parameters for t in group]
    tensors = [x, *(t for group in parameters for t in group if t is not None)]

    def call(x, *rest, op=rank1_mlp, **options):
        rest = iter(rest)
        flat = [None if none else next(rest) for none in without]
        groups = [flat[n * depth : (n + 1) * depth] for n in range(4)]
        return op(x, *groups, **case.options, **options)

    return call, [t.requires_grad_() for t in tensors]


@doubles
def test_gradcheck_of_both_orders(case, seed):
    call, tensors = flat_call(case, seed)
    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)


@doubles
def test_one_node(case, seed):
    call, tensors = flat_call(case, seed)
    y = call(*tensors)
    assert type(y.grad_fn).__name__ == "Rank1MLPBackward"
    before = {type(f).__name__ for f, _ in y.grad_fn.next_functions if f is not None}
    assert before <= {"AccumulateGrad", "ExpandBackward0"}  # of a shared bias


@doubles
def test_only_the_gradients_asked_for(case, seed):
    call, tensors = flat_call(case, seed)
    expected = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    for n in range(len(tensors)):
        some = [t.detach().requires_grad_(m == n) for m, t in enumerate(tensors)]
        (alone,) = torch.autograd.grad(call(*some).square().sum(), some[n])
        torch.testing.assert_close(alone, expected[n])
        rest = [t.detach().requires_grad_(m != n) for m, t in enumerate(tensors)]
        others = torch.autograd.grad(call(*rest).square().sum(), [t for m, t in enumerate(rest) if m != n])
        for value, exact in zip(others, [g for m, g in enumerate(expected) if m != n]):
            torch.testing.assert_close(value, exact)


@doubles
def test_func_compile_and_batched_gradients(case, seed):
    call, tensors = flat_call(case, seed)
    expected = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    plain = [t.detach() for t in tensors]

    def loss(*tensors):
        return call(*tensors).square().sum()

    for value, exact in zip(torch.func.grad(loss, tuple(range(len(plain))))(*plain), expected):
        torch.testing.assert_close(value, exact)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for value, exact in zip(torch.autograd.grad(compiled(*tensors).square().sum(), tensors), expected):
        torch.testing.assert_close(value, exact)
    xs = torch.stack([plain[0], 2 * plain[0]])
    mapped_ = torch.func.vmap(lambda x: call(x, *plain[1:]))(xs)
    torch.testing.assert_close(mapped_, torch.stack([call(x, *plain[1:]) for x in xs]))
    y = call(*tensors)
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, tensors, directions, is_grads_batched=True, retain_graph=True)
    for n, direction in enumerate(directions):
        for values, exact in zip(batched, torch.autograd.grad(y, tensors, direction, retain_graph=True)):
            torch.testing.assert_close(values[n], exact)


def test_saved_bytes(seed):
    """The inputs; besides, each hidden output, and for gelu its pre-activation."""
    case = Case(3, 20, (8, 16, 12, 4), "gelu")
    x, parameters = case.inputs_for(torch.float32, seed=seed)
    x, groups = leaves([x])[0], [leaves(group) for group in parameters]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rank1_mlp(x, *groups, activation="gelu", backend="cpu")
    inputs = [x, *(t for group in groups for t in group)]
    extra = 2 * 3 * 20 * (16 + 12) * 4
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inputs) + extra


def test_layers_that_are_faster_as_torchs_run_so(seed, monkeypatch):
    """With few rows of large weights, unless a backend is named."""
    ran = []
    apply = autograd.apply_plain
    monkeypatch.setattr(autograd, "apply_plain", lambda *a: (ran.append(True), apply(*a))[1])
    case = Case(2, 3, (256, 256, 8), "tanh")
    x, parameters = case.inputs_for(torch.float32, seed=seed)
    grad = torch.randn(2, 3, 8)
    found = gradients(rank1_mlp, x, parameters, grad, **case.options)
    assert not ran
    exact = gradients(reference.rank1_mlp, x, parameters, grad, **case.options)
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-4, atol=1e-4)
    gradients(rank1_mlp, x, parameters, grad, **case.options, backend="cpu")
    assert ran


def test_autocast(seed):
    x, parameters = CASES[1].inputs_for(torch.float32, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        y = rank1_mlp(x, *parameters, **CASES[1].options)
    low = mapped(Tensor.bfloat16, x, parameters)
    torch.testing.assert_close(y, rank1_mlp(low[0], *low[1], **CASES[1].options))


# --------------------------------------------------------------------------------------------------- bad input

E, B, I, H, O = 3, 5, 7, 6, 4


GOOD = {
    "x": f(E, B, I),
    "weights": [f(H, I), f(O, H)],
    "r": [f(E, I), f(E, H)],
    "s": [f(E, H), f(E, O)],
    "biases": [f(E, H), f(O)],
}
BAD = {
    "x_none": ({"x": None}, TypeError, "x", "torch.Tensor"),
    "x_1d": ({"x": f(I)}, ValueError, "x", "[B, I] or [E, B, I]"),
    "x_inputs": ({"x": f(B, I + 1)}, ValueError, "x", "I=7] to fit weights[0] [6, 7]"),
    "x_members": ({"x": f(E + 1, B, I)}, ValueError, "r[0]", "[E=4, I=7] as x [4, 5, 7]"),
    "x_int": ({"x": f(B, I, dtype=torch.int64)}, TypeError, "x", "int64"),
    "weights_tensor": ({"weights": f(2, H, I)}, TypeError, "weights", "a list or tuple"),
    "no_layers": ({"weights": [], "r": [], "s": [], "biases": []}, ValueError, "weights", "at least one layer"),
    "weight_none": ({"weights": [f(H, I), None]}, TypeError, "weights[1]", "torch.Tensor"),
    "weight_3d": ({"weights": [f(H, I), f(E, O, H)]}, ValueError, "weights[1]", "[O, I]"),
    "do_not_chain": ({"weights": [f(H, I), f(O, I)]}, ValueError, "weights[1]", "[O, I=6] to follow weights[0] [6, 7]"),
    "weight_double": ({"weights": [f(H, I), f(O, H).double()]}, TypeError, "weights[1]", "torch.float32 like x"),
    "too_few_r": ({"r": [f(E, I)]}, ValueError, "r", "2, one per weight, got 1"),
    "r_tensor": ({"r": f(2, E, I)}, TypeError, "r", "a list or tuple"),
    "r_none": ({"r": [f(E, I), None]}, TypeError, "r[1]", "torch.Tensor"),
    "r_inputs": ({"r": [f(E, I), f(E, I)]}, ValueError, "r[1]", "[E, I=6] to fit weights[1] [4, 6]"),
    "r_members": ({"r": [f(E, I), f(E + 1, H)]}, ValueError, "r[1]", "[E=3, I=6] as x [3, 5, 7]"),
    "s_outputs": ({"s": [f(E, I), f(E, O)]}, ValueError, "s[0]", "[E, O=6] to fit weights[0] [6, 7]"),
    "s_1d": ({"s": [f(H), f(E, O)]}, ValueError, "s[0]", "[E, O=6]"),
    "s_meta": ({"s": [f(E, H), f(E, O, device="meta")]}, ValueError, "s[1]", "on cpu like x"),
    "shared_x_members": ({"x": f(B, I), "s": [f(2, H), f(E, O)]}, ValueError, "s[0]", "[E=3, O=6] as r[0] [3, 7]"),
    "biases_tensor": ({"biases": f(E, H)}, TypeError, "biases", "None or a list or tuple"),
    "too_few_biases": ({"biases": [f(E, H)]}, ValueError, "biases", "2, one per weight, got 1"),
    "bias_outputs": ({"biases": [f(E, H), f(E, H)]}, ValueError, "biases[1]", "[O=4] or [E=3, O=4]"),
}


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", BAD)
def test_bad_tensors(name, backend, monkeypatch):
    forbid(monkeypatch, (autograd, "chain"), (reference, "layers"))  # the engine checks for itself
    changed, *expected = BAD[name]
    assert_refused(lambda: rank1_mlp(**{**GOOD, **changed}, backend=backend), "rank1_mlp", *expected)


def test_direct_calls_of_the_schema_are_checked():
    x, weights, r, s = f(E, B, I), GOOD["weights"], GOOD["r"], GOOD["s"]
    biases = [None, None]
    for bad in (([], [], [], []), (weights, r[:1], s, biases), (weights, r, s, []), (weights[::-1], r, s, biases)):
        with pytest.raises(RuntimeError, match="rank1_"):
            _native.ops.rank1_mlp_fwd(x, *bad, 1, 0, True)
    y, *kept = _native.ops.rank1_mlp_fwd(x, weights, r, s, biases, 1, 0, True)
    for bad in (kept[:0], kept * 2, [f(E, B, H + 1)]):
        with pytest.raises(RuntimeError, match="rank1_"):
            _native.ops.rank1_mlp_bwd(y, x, weights, r, s, y, bad, 1, 0, True)
    with pytest.raises(RuntimeError, match="rank1_"):
        _native.ops.rank1_mlp_bwd(f(E, B, H), x, weights, r, s, y, kept, 1, 0, True)


def test_unknown_options():
    with pytest.raises(ValueError, match="rank1_mlp: backend should be None or one of 'reference', 'cpu'"):
        rank1_mlp(**GOOD, backend="mkl")
    with pytest.raises(ValueError, match="rank1_mlp: activation should be one of None, 'relu'"):
        rank1_mlp(**GOOD, activation="Relu")
    with pytest.raises(ValueError, match="rank1_mlp: out_activation should be one of None, 'relu'"):
        rank1_mlp(**GOOD, out_activation="softmax")
