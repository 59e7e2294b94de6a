"""mix_templates' Triton kernels in the interpreter: what the cases of test_ops.py do not reach.

There, as here, errors are measured against float64.  A program takes a tenth of a second.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run Triton kernels on CPU tensors", allow_module_level=True)
pytest.importorskip("triton")

from common import name_of

from effens_kernels.ops import triton_engine as engine
from effens_kernels.ops.mix_templates import triton as mix_templates
from effens_kernels.testing import assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes).to(dtype)


def check(coefficients, templates, grad, need=(True, True)) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, and the gradients that are needed, against float64."""
    results = mix_templates.fwd(coefficients, templates), *mix_templates.bwd(grad, coefficients, templates, *need)
    exact, composed = (
        (c @ t, g @ t.T, c.T @ g)
        for c, t, g in (
            [x.to(dtype) for x in (coefficients, templates, grad)] for dtype in (torch.float64, templates.dtype)
        )
    )
    terms = coefficients.shape[1], templates.shape[1], coefficients.shape[0]
    names = "y", "coefficients", "templates"
    for name, ours, wide, narrow, n, needed in zip(names, results, exact, composed, terms, (True, *need), strict=True):
        if needed:
            assert ours.is_contiguous(), name
            assert_accurate(ours, wide, narrow, name, n)
        else:
            assert ours.shape == (0,)
    return results[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("rows", "count", "columns"),
    [
        (1, 1, 1),
        (4, 3, 300),  # more than one tile of columns
        (16, 16, 256),  # whole tiles
        (33, 20, 130),
        (70, 20, 70),  # more than one tile of rows: a launch of its own for dA
        (5, 70, 70),  # more than one tile of templates
    ],
)
def test_values(rows: int, count: int, columns: int, dtype: torch.dtype) -> None:
    coefficients, templates, grad = normal(rows, count), normal(count, columns), normal(rows, columns)
    check(*(t.to(dtype) for t in (coefficients, templates, grad)))


def test_several_steps_of_a_part() -> None:
    """Programs, four per multiprocessor of which the interpreter has few, take several tiles of columns, the last one
    fewer."""
    plan, parts, *_ = mix_templates._plan_bwd(3, 2, 1300, (1300, 2, 1, 1300), torch.float32, "ieee", 0)
    assert (parts, plan.scalars[3] // plan.switches["BLOCK_N"]) == (14, 3)
    first = check(normal(3, 2), normal(2, 1300), normal(3, 1300))
    assert all(t.isfinite().all() for t in first)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rows", [3, 40])
def test_each_gradient_alone(rows: int, need: tuple[bool, bool]) -> None:
    inputs = normal(rows, 5), normal(5, 50), normal(rows, 50)
    every, some = check(*inputs), check(*inputs, need)
    for whole, alone, needed in zip(every, some, need):
        if needed:
            torch.testing.assert_close(alone, whole)


def test_the_same_bits_again() -> None:
    inputs = normal(7, 5), normal(5, 700), normal(7, 700)
    assert all(map(torch.equal, check(*inputs), check(*inputs)))


def test_strides() -> None:
    """Gradients of sums, transposed ones and one row for all; steps and repetitions of every operand."""
    rows, count, columns = 3, 4, 20
    coefficients, templates, grad = normal(rows, count), normal(count, columns), normal(rows, columns)
    for view in (
        normal(1)[0].expand(rows, columns),
        normal(columns).expand(rows, columns),
        normal(columns, rows).T,
        normal(rows, 2 * columns)[:, 1::2],
        normal(rows, columns + 3)[:, 3:],
        torch._neg_view(grad),
    ):
        check(coefficients, templates, view)
    for view in (normal(count, columns + 1)[:, 1:], normal(columns, count).T, normal(columns).expand(count, columns)):
        check(coefficients, view, grad)
    for view in (normal(count, rows).T, normal(rows, 2 * count)[:, ::2], normal(count).expand(rows, count)):
        check(view, templates, grad)
    check(torch._neg_view(coefficients), torch._neg_view(templates), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_to_sum_makes_zeros(dtype: torch.dtype) -> None:
    for rows, columns in [(0, 7), (3, 0), (0, 0)]:
        sizes = (rows, 4), (4, columns), (rows, columns)
        coefficients, templates, grad = (torch.ones(size, dtype=dtype) for size in sizes)
        assert mix_templates.fwd(coefficients, templates).shape == (rows, columns)
        dc, dt = mix_templates.bwd(grad, coefficients, templates, True, True)
        assert torch.equal(dc, torch.zeros_like(coefficients))
        assert torch.equal(dt, torch.zeros_like(templates))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, which the interpreter computes with
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_not_finite_values_flow_through(dtype: torch.dtype) -> None:
    """To where PyTorch has them, and nowhere else: not from beyond the edge of tiles either."""
    coefficients, templates, grad = (normal(*size, dtype=dtype) for size in ((5, 3), (3, 37), (5, 37)))
    coefficients[-1, 1], templates[-1, 2], grad[-2, -1] = float("nan"), float("inf"), float("-inf")
    actual = (
        mix_templates.fwd(coefficients, templates),
        *mix_templates.bwd(grad, coefficients, templates, True, True),
    )
    wide = [t.double() for t in (coefficients, templates, grad)]
    for value, expected in zip(actual, (wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]), strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
        assert torch.equal(value.isposinf(), expected.isposinf())
        assert torch.equal(value.isneginf(), expected.isneginf())


def test_order_of_parts() -> None:
    """More parts than are loaded at once, and more sums than a program has."""
    size, count, block = 37, 150, engine.Block(32)
    parts, result = normal(count, size), torch.full((size,), torch.nan)
    plan = engine.Plan.of(mix_templates.mix_templates_add_kernel, 2, (size, count), block)
    engine.launch(plan, parts, result)
    torch.testing.assert_close(result, parts.sum(0))


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values with those strides; the pages between them are never touched."""
    storage = values.new_empty(sum((size - 1) * stride for size, stride in zip(values.shape, strides)) + 1)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    ("which", "strides"),
    [(0, (1 << 30, 1)), (0, (1, 1 << 30)), (1, (1 << 30, 1)), (2, (1 << 30, 1))],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else ("c", "templates", "grad")[value],
)
def test_offsets_beyond_32_bits(which: int, strides: tuple[int, ...]) -> None:
    tensors = [normal(*size, dtype=torch.float16) for size in ((3, 3), (3, 5), (3, 5))]
    tensors[which] = spread(tensors[which], strides)
    assert (torch.tensor(tensors[which].shape) - 1) @ torch.tensor(strides) >= 2**31
    check(*tensors)
