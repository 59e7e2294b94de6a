"""Convolutions of mixed templates: what is theirs alone.  `test_member_convolution.py` has values and derivatives."""

from __future__ import annotations

import pytest
import torch
from common import leaves, name_of
from conv_cases import MixtureConvCase as Case
from conv_cases import derivatives, kept_by, widened

from effens_kernels import mix_templates, mixture_conv2d, rank1_conv2d
from effens_kernels.ops.mix_templates import autograd as mixing
from effens_kernels.ops.mixture_conv2d import synthesis
from effens_kernels.testing import DTYPES, assert_accurate


def moved(inputs, device):
    return [None if t is None else t.to(device) for t in inputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 3, 4, (4, 3), (2, 2)),
        Case(2, 2, 3, 4, (4, 3), (2, 2), shared=True, bias="shared", options={"padding": 1}, templates=1),
        Case(3, 1, 4, 6, (3, 3), (3, 1), weight_layout="channels_last", options={"groups": 2}, templates=7),
        Case(2, 2, 4, 2, (3, 3), (2, 2), op="conv_transpose2d", bias="none"),
    ],
    ids=str,
)
def test_every_backend_of_mixing(case, dtype, runner):
    if dtype not in runner.dtypes("mixture_conv2d"):
        with pytest.raises(ValueError, match=f"mixture_{case.op}: backend '{runner.backend}' cannot run this call"):
            case.run(*moved(case.inputs_for(dtype), runner.device), backend=runner.backend)
        return
    inputs = case.inputs_for(dtype)
    with torch.no_grad():
        grad = torch.randn_like(case.run(*inputs, backend="reference"))
    exact = derivatives(case, widened(inputs), grad.double(), backend="reference")
    composition = derivatives(case, moved(inputs, runner.device), grad.to(runner.device), backend="reference")
    actual = derivatives(case, moved(inputs, runner.device), grad.to(runner.device), backend=runner.backend)
    for name, value in actual.items():
        assert_accurate(value, exact[name], composition[name], name, case.terms(name))


@pytest.mark.parametrize("templates", [1, 2, 13])
def test_any_number_of_templates(templates):
    case = Case(templates=templates, options={"padding": 1})
    inputs = case.inputs_for(torch.float64)
    actual, expected = derivatives(case, inputs), derivatives(case, inputs, backend="reference")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11)


def test_one_template_is_one_scaled_weight():
    """With one template and coefficients c this is BatchEnsemble with constant scales."""
    x, coefficients, templates, bias = Case(templates=1, options={"padding": 1}).inputs_for(torch.float64)
    scales = coefficients.expand(-1, 8)
    expected = rank1_conv2d(x, templates[0], torch.ones(3, 6, dtype=torch.float64), scales, bias, padding=1)
    torch.testing.assert_close(mixture_conv2d(x, coefficients, templates, bias, padding=1), expected)


def test_coefficients_that_select_templates_make_plain_convolutions():
    case = Case(shared=True, options={"stride": 2})
    x, _, templates, bias = case.inputs_for(torch.float64)
    y = mixture_conv2d(x, torch.eye(5, dtype=torch.float64)[[4, 0, 2]], templates, bias, stride=2)
    for result, n, own in zip(y, (4, 0, 2), bias):
        torch.testing.assert_close(result, torch.conv2d(x, templates[n], own, stride=2))


@pytest.mark.parametrize("x_needs", [False, True], ids=["data", "hidden"])
@pytest.mark.parametrize("needed", ["coefficients", "templates", "both", "none"])
def test_templates_are_read_once_forward_and_once_or_twice_backward(monkeypatch, needed, x_needs):
    """All members are mixed by one call; weights are mixed again only for the gradient of x."""
    case = Case()
    x, coefficients, templates, bias = case.inputs_for()
    x.requires_grad_(x_needs)
    coefficients.requires_grad_(needed in ("coefficients", "both"))
    templates.requires_grad_(needed in ("templates", "both"))
    bias.requires_grad_()
    real, calls = mixing.kernels, []

    class Watched:
        def __init__(self, backend):
            self.module = real(backend)

        def fwd(self, *arguments):
            calls.append(("fwd", *arguments[0].shape))
            return self.module.fwd(*arguments)

        def bwd(self, *arguments):
            calls.append(("bwd", *arguments[-2:]))
            return self.module.bwd(*arguments)

    monkeypatch.setattr(synthesis, "kernels", Watched)
    y = mixture_conv2d(x, coefficients, templates, bias)
    assert calls == [("fwd", 3, 5)]
    calls.clear()
    y.sum().backward()
    wanted = coefficients.requires_grad, templates.requires_grad
    assert calls == [("fwd", 3, 5)] * x_needs + [("bwd", *wanted)] * any(wanted)


def test_weights_of_members_are_not_kept():
    """Neither the weights nor a copy of the templates, also where mixing has to copy them."""
    case = Case(8, 2, 16, 16, templates=2, weight_layout="cropped")
    inputs = leaves(case.inputs_for())
    kept = kept_by(lambda: case.run(*inputs))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs[:3]}


def test_templates_that_are_part_of_a_bank():
    """Rows of a longer tensor, which other layers use too: read in place, with gradients in their place."""
    bank = torch.randn(4, 1000, dtype=torch.float64, requires_grad=True)
    x, coefficients = torch.randn(3, 2, 6, 5, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def grads(backend):
        templates = bank[:, 100 : 100 + 8 * 6 * 9].view(4, 8, 6, 3, 3)
        y = mixture_conv2d(x, coefficients, templates, backend=backend)
        return torch.autograd.grad(y.square().sum(), bank)[0]

    torch.testing.assert_close(grads(None), grads("reference"), rtol=1e-11, atol=1e-11)


def test_one_tensor_in_two_places():
    """Coefficients that depend on x; a gradient penalty then has every path."""
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    templates = torch.randn(4, 4, 4, 3, 3, dtype=torch.float64)

    def penalty(x, backend):
        y = mixture_conv2d(x, x.mean((1, 3, 4)), templates, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty(x, None), penalty(x, "reference"), rtol=1e-11, atol=1e-9)


def test_is_mix_templates_and_a_convolution_per_member():
    x, coefficients, templates, bias = Case().inputs_for()
    weights = mix_templates(coefficients, templates)
    expected = [torch.conv2d(*member) for member in zip(x, weights, bias)]
    assert torch.equal(mixture_conv2d(x, coefficients, templates, bias), torch.stack(expected))


# --------------------------------------------------------------------------------------------------------- dispatch


def test_mixing_is_chosen_as_for_mix_templates(monkeypatch):
    asked = []

    def ask(problem, requested=None):
        asked.append(problem)
        return "reference"

    monkeypatch.setattr("effens_kernels._dispatch.select", ask)
    inputs = Case().inputs_for()
    expected = mixture_conv2d(*inputs, backend="reference")
    asked.clear()
    torch.testing.assert_close(mixture_conv2d(*inputs), expected)
    assert [(p.op, p.sizes) for p in asked] == [("mix_templates", (3, 5, 8 * 6 * 3 * 3))]


def test_where_no_kernel_mixes_nothing_more_is_kept(monkeypatch):
    """Without the compiled extension it is PyTorch's product that mixes; all else stays."""
    monkeypatch.setattr("effens_kernels._dispatch.why_not_here", lambda backend: "imagined")
    case = Case(options={"padding": 1})
    inputs = case.inputs_for(torch.float64)
    actual, expected = derivatives(case, inputs), derivatives(case, inputs, backend="reference")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11)
    inputs = leaves(inputs)
    kept = kept_by(lambda: case.run(*inputs))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs[:3]}


def test_backend_from_the_environment(monkeypatch):
    """EFFENS_BACKEND counts as a named backend: of mixing, or all of it in PyTorch's operations, or a refusal."""
    inputs = Case().inputs_for()
    monkeypatch.setattr("effens_kernels._env.BACKEND", "reference")
    monkeypatch.setattr(synthesis, "apply", None)
    assert torch.equal(mixture_conv2d(*inputs), mixture_conv2d(*inputs, backend="reference"))
    monkeypatch.setattr("effens_kernels._env.BACKEND", "cpu")
    monkeypatch.setattr("effens_kernels._dispatch.why_not_here", lambda backend: "imagined")
    with pytest.raises(ValueError, match="mixture_conv2d: backend 'cpu' cannot run this call: imagined"):
        mixture_conv2d(*inputs)


def test_kernels_have_no_forward_mode():
    """As mix_templates, which is refused rather than its tangents dropped, unless PyTorch's operations do it."""
    inputs = tuple(Case().inputs_for())
    with pytest.raises(RuntimeError, match=r"(?i)forward.*mode|jvp"):
        torch.func.jvp(lambda *args: mixture_conv2d(*args, backend="cpu"), inputs, inputs)
