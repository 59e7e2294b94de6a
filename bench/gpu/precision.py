"""Dtypes by name; float32 as two, because a GPU computes its products in two ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}
TOLERANCE = {"tf32": 1e-2}  # relative norm by which contestants may differ; others: see contestants.base


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Products of float32 are rounded to TF32 in here, or not, by PyTorch and by us."""
    dtype, how = PRECISIONS[name]
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    # The older of PyTorch's two switches sets both; the newer one alone makes torch.compile, which reads both, raise.
    settings.allow_tf32 = how == "tf32"
    try:
        yield dtype
    finally:
        settings.allow_tf32 = False
        settings.fp32_precision = before
