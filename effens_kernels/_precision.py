"""How float32 products may be computed on a GPU."""

from __future__ import annotations

import torch


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are rounded to TF32: where the user allows PyTorch's own matmul that."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
