"""Bad input of mixture convolutions: errors that name op, argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from effens_kernels import mixture_conv1d, mixture_conv2d, mixture_conv_transpose2d

E, B, C, O, T = 3, 4, 6, 8, 5


def bad(**changes):
    """The default call with some arguments changed."""
    x, coefficients, templates = torch.randn(E, B, C, 9, 7), torch.randn(E, T), torch.randn(T, O, C, 3, 3)
    return {"x": x, "coefficients": coefficients, "templates": templates, "bias": torch.randn(E, O), **changes}


TEMPLATES = "templates should be [T, O, C / groups, kh, kw], none of them 0, got float32"
BAD = {
    "x_list": ({"x": [1.0]}, TypeError, "x should be a torch.Tensor, got list"),
    "coefficients_number": ({"coefficients": 1.0}, TypeError, "coefficients should be a torch.Tensor, got float 1.0"),
    "coefficients_none": ({"coefficients": None}, TypeError, "coefficients should be a torch.Tensor, got NoneType"),
    "templates_list": ({"templates": [torch.ones(O, C, 3, 3)]}, TypeError, "templates should be a torch.Tensor, got l"),
    "bias_true": ({"bias": True}, TypeError, "bias should be a torch.Tensor"),
    "x_int": ({"x": torch.ones(4, 6, 9, 7, dtype=torch.int64)}, TypeError, "float32, float16, bfloat16 or float64"),
    "coefficients_dtype": (
        {"coefficients": torch.ones(E, T).half()},
        TypeError,
        "coefficients should be torch.float32 like x, got float16[3, 5] on cpu",
    ),
    "templates_dtype": (
        {"templates": torch.ones(T, O, C, 3, 3).double()},
        TypeError,
        "templates should be torch.float32 like x, got float64[5, 8, 6, 3, 3]",
    ),
    "bias_dtype": ({"bias": torch.ones(3, 8).half()}, TypeError, "bias should be torch.float32 like x"),
    "templates_device": (
        {"templates": torch.ones(T, O, C, 3, 3, device="meta")},
        ValueError,
        "templates should be on cpu like x",
    ),
    "x_sparse": ({"x": torch.ones(4, 6, 9, 7).to_sparse()}, TypeError, "x should be a dense (strided) tensor"),
    "templates_rank": ({"templates": torch.ones(O, C, 3, 3)}, ValueError, TEMPLATES + "[8, 6, 3, 3]"),
    "templates_none": ({"templates": torch.ones(0, O, C, 3, 3)}, ValueError, TEMPLATES + "[0, 8, 6, 3, 3]"),
    "templates_no_outputs": ({"templates": torch.ones(T, 0, C, 3, 3)}, ValueError, TEMPLATES),
    "templates_no_kernel": ({"templates": torch.ones(T, O, C, 3, 0)}, ValueError, TEMPLATES),
    "coefficients_rank": (
        {"coefficients": torch.ones(T)},
        ValueError,
        "coefficients should be [E, T=5] to fit templates [5, 8, 6, 3, 3] with groups=1, got float32[5] on cpu",
    ),
    "coefficients_three_axes": ({"coefficients": torch.ones(E, 1, T)}, ValueError, "coefficients should be [E, T=5]"),
    "coefficients_too_few": (
        {"coefficients": torch.ones(E, 4)},
        ValueError,
        "coefficients should be [E, T=5] to fit templates [5, 8, 6, 3, 3] with groups=1, got float32[3, 4] on cpu",
    ),
    "x_rank": ({"x": torch.ones(6, 9, 7)}, ValueError, "x should be [B, C, H, W] or [E, B, C, H, W], got float32[6"),
    "x_channels": ({"x": torch.ones(3, 4, 5, 9, 7)}, ValueError, "x should be of C=6 channels (axis -3) to fit templ"),
    "x_members": (
        {"x": torch.ones(2, 4, 6, 9, 7)},
        ValueError,
        "x should be images of E=3 members (axis 0) to fit coefficients [3, 5], got float32[2, 4, 6, 9, 7]",
    ),
    "x_small": (
        {"x": torch.ones(3, 4, 6, 2, 7)},
        ValueError,
        "x should be large enough for templates [5, 8, 6, 3, 3], padding (0, 0) and dilation (1, 1) to leave a pixel",
    ),
    "bias_rank": ({"bias": torch.ones(3, 1, 8)}, ValueError, "bias should be [O=8] or [E=3, O=8], got float32[3, 1,"),
    "bias_members": ({"bias": torch.ones(1, 8)}, ValueError, "bias should be [O=8] or [E=3, O=8], got float32[1, 8]"),
    "stride_0": ({"stride": 0}, ValueError, "stride should be an int of at least 1, or 2 of them, got 0"),
    "stride_float": ({"stride": 1.5}, TypeError, "stride should be an int of at least 1, or 2 of them, got 1.5"),
    "stride_three": ({"stride": (1, 2, 3)}, ValueError, "or 2 of them, got (1, 2, 3)"),
    "padding_negative": ({"padding": -1}, ValueError, "padding should be an int of at least 0, or 2 of them, got -1"),
    "padding_word": ({"padding": "full"}, ValueError, "padding should be numbers, 'same' or 'valid', got 'full'"),
    "padding_same": (
        {"padding": "same", "stride": 2},
        ValueError,
        "padding should be numbers or 'valid' with stride (2, 2), got 'same'",
    ),
    "dilation_0": ({"dilation": (1, 0)}, ValueError, "dilation should be an int of at least 1, or 2 of them, got (1"),
    "groups_0": ({"groups": 0}, ValueError, "groups should be an int of at least 1, got 0"),
    "groups_float": ({"groups": 2.0}, TypeError, "groups should be an int of at least 1, got 2.0"),
    "groups_3": ({"groups": 3}, ValueError, "groups should be a divisor of templates' 8 channels, got 3"),
    "groups_2": (
        {"groups": 2},
        ValueError,
        "x should be of C=12 channels (axis -3) to fit templates [5, 8, 6, 3, 3] with groups=2, got float32[3, 4, 6, 9",
    ),
    "backend_word": ({"backend": "synthesis"}, ValueError, "backend should be None or one of 'reference', 'cpu'"),
    "backend_number": ({"backend": 3}, ValueError, "backend should be None or one of 'reference', 'cpu', 'triton', "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, words = BAD[name]
    with pytest.raises(error) as raised:
        mixture_conv2d(**bad(**changes))
    assert str(raised.value).startswith("mixture_conv2d: ")
    assert words in str(raised.value)


def test_a_backend_for_other_tensors(monkeypatch):
    monkeypatch.setattr("effens_kernels._dispatch.takes_device", lambda backend: "cuda")
    with pytest.raises(ValueError, match="mixture_conv2d: backend 'triton' cannot run this call: the tensors are on"):
        mixture_conv2d(**bad(backend="triton"))
    double = {name: t.double() for name, t in bad().items()}
    with pytest.raises(ValueError, match="'cuda' cannot run this call: mixture_conv2d has no float64 kernel there"):
        mixture_conv2d(**double, backend="cuda")


def test_bad_input_of_the_siblings():
    x, coefficients, templates = torch.ones(2, 6, 5, 5), torch.ones(3, 5), torch.ones(5, 6, 8, 3, 3)
    call = mixture_conv_transpose2d
    with pytest.raises(ValueError, match=r"mixture_conv_transpose2d: output_padding should be less than stride \(1, 1"):
        call(x, coefficients, templates, output_padding=1)
    with pytest.raises(ValueError, match=r"mixture_conv_transpose2d: bias should be \[O=16\] or \[E=3, O=16\]"):
        call(x, coefficients, templates, torch.ones(8), groups=2)
    with pytest.raises(ValueError, match="mixture_conv_transpose2d: groups should be a divisor of templates' 6 chan"):
        call(x, coefficients, templates, groups=4)
    with pytest.raises(ValueError, match=r"mixture_conv_transpose2d: templates should be \[T, C, O / groups, kh, kw\]"):
        call(x, coefficients, templates[0])
    with pytest.raises(TypeError, match=r"mixture_conv_transpose2d: padding should be an int of at least 0"):
        call(x, coefficients, templates, padding="same")
    with pytest.raises(ValueError, match="mixture_conv_transpose2d: x should be large enough for templates"):
        call(x[..., :1, :1], coefficients, templates, padding=2)
    with pytest.raises(ValueError, match=r"mixture_conv1d: templates should be \[T, O, C / groups, k\], none of them"):
        mixture_conv1d(x[0], coefficients, templates)
    with pytest.raises(ValueError, match="mixture_conv1d: stride should be an int of at least 1, got 0"):
        mixture_conv1d(torch.ones(2, 8, 5), coefficients, templates[..., 0], stride=0)
