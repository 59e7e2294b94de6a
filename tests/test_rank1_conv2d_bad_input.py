"""Bad input of BatchEnsemble convolutions: errors that name op, argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from effens_kernels import rank1_conv1d, rank1_conv2d, rank1_conv_transpose2d

E, B, C, O = 3, 4, 6, 8


def bad(**changes):
    """The default call with some arguments changed."""
    x, weight = torch.randn(E, B, C, 9, 7), torch.randn(O, C, 3, 3)
    r, s, bias = torch.randn(E, C), torch.randn(E, O), torch.randn(E, O)
    return {"x": x, "weight": weight, "r": r, "s": s, "bias": bias, **changes}


BAD = {
    "x_list": ({"x": [1.0]}, TypeError, "x should be a torch.Tensor, got list"),
    "weight_none": ({"weight": None}, TypeError, "weight should be a torch.Tensor, got NoneType None"),
    "r_number": ({"r": 1.0}, TypeError, "r should be a torch.Tensor"),
    "s_none": ({"s": None}, TypeError, "s should be a torch.Tensor"),
    "bias_true": ({"bias": True}, TypeError, "bias should be a torch.Tensor"),
    "x_int": ({"x": torch.ones(4, 6, 9, 7, dtype=torch.int64)}, TypeError, "float32, float16, bfloat16 or float64"),
    "weight_dtype": ({"weight": torch.ones(8, 6, 3, 3).double()}, TypeError, "weight should be torch.float32 like x"),
    "r_dtype": ({"r": torch.ones(3, 6).half()}, TypeError, "r should be torch.float32 like x, got float16[3, 6]"),
    "s_dtype": ({"s": torch.ones(3, 8).half()}, TypeError, "s should be torch.float32 like x"),
    "bias_dtype": ({"bias": torch.ones(3, 8).half()}, TypeError, "bias should be torch.float32 like x"),
    "r_device": ({"r": torch.ones(3, 6, device="meta")}, ValueError, "r should be on cpu like x"),
    "x_sparse": ({"x": torch.ones(4, 6, 9, 7).to_sparse()}, TypeError, "x should be a dense (strided) tensor"),
    "weight_rank": ({"weight": torch.ones(8, 6, 3)}, ValueError, "weight should be [O, C / groups, kh, kw]"),
    "weight_empty": ({"weight": torch.ones(0, 6, 3, 3)}, ValueError, "weight should be [O, C / groups, kh, kw], none"),
    "x_rank": ({"x": torch.ones(6, 9, 7)}, ValueError, "x should be [B, C, H, W] or [E, B, C, H, W], got float32[6"),
    "x_channels": ({"x": torch.ones(3, 4, 5, 9, 7)}, ValueError, "x should be of C=6 channels (axis -3) to fit weig"),
    "x_members": ({"x": torch.ones(2, 4, 6, 9, 7)}, ValueError, "x should be images of E=3 members (axis 0) to fit r"),
    "x_small": ({"x": torch.ones(3, 4, 6, 2, 7)}, ValueError, "x should be large enough for weight [8, 6, 3, 3], pad"),
    "r_rank": ({"r": torch.ones(6)}, ValueError, "r should be [E, C=6] (scales of the inputs) to fit weight"),
    "r_channels": ({"r": torch.ones(3, 8)}, ValueError, "r should be [E, C=6] (scales of the inputs) to fit weight"),
    "s_channels": ({"s": torch.ones(3, 6)}, ValueError, "s should be [E, O=8] (scales of the outputs) to fit weight"),
    "s_members": ({"s": torch.ones(4, 8)}, ValueError, "s should be [E=3, O=8] to fit r [3, 6], got float32[4, 8]"),
    "bias_rank": (
        {"bias": torch.ones(3, 1, 8)},
        ValueError,
        "bias should be [O=8] or [E=3, O=8], got float32[3, 1, 8]",
    ),
    "bias_members": ({"bias": torch.ones(1, 8)}, ValueError, "bias should be [O=8] or [E=3, O=8], got float32[1, 8]"),
    "stride_0": ({"stride": 0}, ValueError, "stride should be an int of at least 1, or 2 of them, got 0"),
    "stride_float": ({"stride": 1.5}, TypeError, "stride should be an int of at least 1, or 2 of them, got 1.5"),
    "stride_three": ({"stride": (1, 2, 3)}, ValueError, "or 2 of them, got (1, 2, 3)"),
    "stride_empty": ({"stride": ()}, ValueError, "or 2 of them, got ()"),
    "stride_bool": ({"stride": True}, TypeError, "stride should be an int"),
    "padding_negative": ({"padding": -1}, ValueError, "padding should be an int of at least 0, or 2 of them, got -1"),
    "padding_word": ({"padding": "full"}, ValueError, "padding should be numbers, 'same' or 'valid', got 'full'"),
    "padding_none": ({"padding": None}, TypeError, "padding should be an int of at least 0"),
    "padding_same": (
        {"padding": "same", "stride": 2},
        ValueError,
        "padding should be numbers or 'valid' with stride (",
    ),
    "dilation_0": (
        {"dilation": (1, 0)},
        ValueError,
        "dilation should be an int of at least 1, or 2 of them, got (1, 0",
    ),
    "groups_0": ({"groups": 0}, ValueError, "groups should be an int of at least 1, got 0"),
    "groups_float": ({"groups": 2.0}, TypeError, "groups should be an int of at least 1, got 2.0"),
    "groups_3": ({"groups": 3}, ValueError, "groups should be a divisor of weight's 8 channels, got 3"),
    "groups_2": (
        {"groups": 2},
        ValueError,
        "x should be of C=12 channels (axis -3) to fit weight [8, 6, 3, 3] with gro",
    ),
    "backend_cpu": (
        {"backend": "cpu"},
        ValueError,
        "backend 'cpu' cannot run this call: it has no kernel for rank1_con",
    ),
    "backend_cuda": (
        {"backend": "cuda"},
        ValueError,
        "backend 'cuda' cannot run this call: it has no kernel for rank1",
    ),
    "backend_word": ({"backend": "folded"}, ValueError, "backend should be None or one of 'reference', 'cpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, words = BAD[name]
    with pytest.raises(error) as raised:
        rank1_conv2d(**bad(**changes))
    assert str(raised.value).startswith("rank1_conv2d: ")
    assert words in str(raised.value)


def test_bad_input_of_the_siblings():
    x, weight, r, s = torch.ones(2, 6, 5, 5), torch.ones(6, 8, 3, 3), torch.ones(3, 6), torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"rank1_conv_transpose2d: output_padding should be less than stride \(1, 1\)"):
        rank1_conv_transpose2d(x, weight, r, s, output_padding=1)
    with pytest.raises(ValueError, match=r"rank1_conv_transpose2d: s should be \[E, O=16\].* with groups=2"):
        rank1_conv_transpose2d(x, weight, r, s, groups=2)
    with pytest.raises(TypeError, match=r"rank1_conv_transpose2d: padding should be an int of at least 0"):
        rank1_conv_transpose2d(x, weight, r, s, padding="same")
    with pytest.raises(ValueError, match="rank1_conv_transpose2d: x should be large enough for weight"):
        rank1_conv_transpose2d(x[..., :1, :1], weight, r, s, padding=2)
    with pytest.raises(ValueError, match=r"rank1_conv1d: weight should be \[O, C / groups, k\], none of them 0"):
        rank1_conv1d(x[0], weight, r, s)
    with pytest.raises(ValueError, match="rank1_conv1d: stride should be an int of at least 1, got 0"):
        rank1_conv1d(x[0], weight[0], torch.ones(3, 8), torch.ones(3, 6), stride=0)
