"""mix_with_noise_: values against float64 on every backend, strides, where the result lies, bad input."""

from __future__ import annotations

import pytest
import torch
from common import name_of, runs
from torch import Tensor

from effens_kernels import _native
from effens_kernels.ops.mix_templates.noise import mix_with_noise_
from effens_kernels.testing import assert_accurate

HALF = torch.float16, torch.bfloat16
BACKENDS = [pytest.param(d, "reference", id=f"{name_of(d)}-reference") for d in (torch.float32, *HALF, torch.float64)]
BACKENDS += runs(torch.float32, *HALF, torch.float64, op="mix_with_noise_")
SIZES = [(1, 1, 1), (3, 2, 17), (9, 5, 130), (17, 21, 70), (5, 70, 64), (0, 3, 5), (3, 3, 0)]


@pytest.fixture
def backend(request):
    """The name of the backend of a runner, which runs; or the reference."""
    if request.param == "reference":
        yield "reference", "cpu"
        return
    from conftest import run_with

    yield from ((running.backend, running.device) for running in run_with(request.param))


every_backend = pytest.mark.parametrize(("dtype", "backend"), BACKENDS, indirect=["backend"])


def normal(*sizes: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64).to(device, dtype)


def check(noise: Tensor, sigma: Tensor, coefficients: Tensor, templates: Tensor, backend: str) -> None:
    """Values and memory; `noise` is overwritten."""
    arguments = noise, sigma, coefficients, templates
    wide = [t.double() for t in arguments]
    exact = wide[0] * wide[1] + wide[2] @ wide[3]
    composed = torch.addcmul(coefficients @ templates, noise, sigma)
    kept = [t.clone() for t in arguments[1:]]
    result = mix_with_noise_(*arguments, backend=backend)
    assert result is noise
    assert_accurate(noise, exact, composed, "noise", templates.shape[0] + 1)
    assert all(map(torch.equal, kept, arguments[1:]))


@every_backend
def test_values(dtype, backend):
    name, device = backend
    for rows, count, columns in SIZES:
        options = {"dtype": dtype, "device": device}
        noise, sigma = normal(rows, columns, **options), normal(columns, **options)
        check(noise, sigma, normal(rows, count, **options), normal(count, columns, **options), name)


@every_backend
def test_strides(dtype, backend):
    """Some rows of more, every second column, one row for all; coefficients transposed; one sigma for all."""
    name, device = backend
    if dtype in HALF:
        return
    options = {"dtype": dtype, "device": device}
    for templates in (
        normal(7, 37, **options)[1:5],
        normal(8, 37, **options)[::2],
        normal(4, 75, **options)[:, 1::2],
        normal(37, 4, **options).T,
        normal(37, **options).expand(4, 37),
    ):
        check(normal(3, 37, **options), normal(37, **options), normal(3, 4, **options), templates, name)
    templates = normal(4, 37, **options)
    for coefficients in (normal(4, 3, **options).T, normal(3, 8, **options)[:, ::2], normal(4, **options).expand(3, 4)):
        check(normal(3, 37, **options), normal(37, **options), coefficients, templates, name)
    for sigma in (normal(1, **options).expand(37), normal(74, **options)[::2], torch._neg_view(normal(37, **options))):
        check(normal(3, 37, **options), sigma, normal(3, 4, **options), templates, name)


@pytest.mark.parametrize(("rows", "count"), [(3, 5), (8, 21), (20, 3), (11, 40)])
def test_columns_of_several_tasks(isa, rows, count, threads):
    """And the same bits for any number of threads."""
    options = {"dtype": torch.float32, "device": "cpu"}
    arguments = normal(60_001, **options), normal(rows, count, **options), normal(count, 60_001, **options)
    noise = normal(rows, 60_001, **options)
    again = noise.clone()
    threads(3)
    check(noise, *arguments, "cpu")
    threads(1)
    check(again, *arguments, "cpu")
    assert torch.equal(noise, again)


@every_backend
def test_no_sigma_and_one_coefficient_give_the_template_itself(dtype, backend):
    name, device = backend
    options = {"dtype": dtype, "device": device}
    templates, coefficients = normal(4, 70, **options), torch.zeros(5, 4, **options)
    coefficients[:, 2] = 1
    noise = mix_with_noise_(normal(5, 70, **options), torch.zeros(70, **options), coefficients, templates, backend=name)
    assert torch.equal(noise, templates[2].expand(5, 70))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_output_of_nan_stays_where_it_is(backend):
    """Columns do not mix, and nothing is read from beyond an edge."""
    options = {"dtype": torch.float32, "device": "cpu"}
    noise, templates = normal(3, 50, **options), normal(4, 50, **options)
    noise[1, 49], templates[2, 7] = float("nan"), float("inf")
    mix_with_noise_(noise, normal(50, **options), normal(3, 4, **options), templates, backend=backend)
    expected = torch.zeros(3, 50, dtype=torch.bool)
    expected[1, 49], expected[:, 7] = True, True
    assert torch.equal(~noise.isfinite(), expected)


# -------------------------------------------------------------------------------------------------------- bad input


def f(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **options)


GOOD = {"noise": f(3, 7), "sigma": f(7), "coefficients": f(3, 2), "templates": f(2, 7)}
BAD = {
    "noise_list": ({"noise": [1.0]}, TypeError, "noise", "torch.Tensor"),
    "noise_int": ({"noise": f(3, 7, dtype=torch.int32)}, TypeError, "noise", "int32"),
    "noise_1d": ({"noise": f(7)}, ValueError, "noise", "[M, N]"),
    "noise_stepped": ({"noise": f(3, 14)[:, ::2]}, ValueError, "noise", "contiguous"),
    "noise_transposed": ({"noise": f(7, 3).T}, ValueError, "noise", "contiguous"),
    "sigma_none": ({"sigma": None}, TypeError, "sigma", "torch.Tensor"),
    "sigma_width": ({"sigma": f(1)}, ValueError, "sigma", "[N=7]"),
    "sigma_rows": ({"sigma": f(3, 7)}, ValueError, "sigma", "[N=7]"),
    "sigma_double": ({"sigma": f(7, dtype=torch.float64)}, TypeError, "sigma", "float64"),
    "sigma_meta": ({"sigma": f(7, device="meta")}, ValueError, "sigma", "meta"),
    "coefficients_rows": ({"coefficients": f(2, 2)}, ValueError, "coefficients", "[M=3, T=2]"),
    "coefficients_count": ({"coefficients": f(3, 3)}, ValueError, "coefficients", "[M=3, T=2]"),
    "templates_width": ({"templates": f(2, 6)}, ValueError, "templates", "N=7"),
    "templates_3d": ({"templates": f(2, 7, 1)}, ValueError, "templates", "[T, N=7]"),
    "no_templates": ({"coefficients": f(3, 0), "templates": f(0, 7)}, ValueError, "templates", "at least one"),
    **{
        f"{name}_followed": ({name: GOOD[name].clone().requires_grad_()}, ValueError, name, "no derivative")
        for name in GOOD
    },
}


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", BAD)
def test_bad_tensors(name, backend):
    changed, error, argument, words = BAD[name]
    arguments = {**{name: t.clone() for name, t in GOOD.items()}, **changed}
    if isinstance(arguments["noise"], Tensor):
        with torch.no_grad():
            arguments["noise"].fill_(1)
    with pytest.raises(error) as raised:
        mix_with_noise_(**arguments, backend=backend)
    message = str(raised.value)
    assert message.startswith(f"mix_with_noise_: {argument} should be ")
    assert ", got " in message
    assert words in message
    if isinstance(arguments["noise"], Tensor):
        assert (arguments["noise"] == 1).all()


def test_unknown_backend():
    with pytest.raises(ValueError, match="mix_with_noise_: backend should be None or one of 'reference', 'cpu'"):
        mix_with_noise_(**GOOD, backend="mkl")


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("noise_list", "sigma_none") and "followed" not in n])
def test_direct_calls_of_the_schema_are_checked_too(name):
    arguments = {**GOOD, **BAD[name][0]}
    if any(t.is_meta for t in arguments.values()):
        return
    with pytest.raises(RuntimeError, match="mix_with_noise_"):
        _native.ops.mix_with_noise_(*arguments.values())
