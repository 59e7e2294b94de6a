"""The GPU's memory between measurements: a cold cache before a step, and nothing left of the row before."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from ..timing import nothing


def release_memory() -> None:
    """Graphs keep their memory until the last cycle of references to them is collected."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evict_l2(device: str) -> Callable[[], None]:
    """A step then finds its inputs where a model larger than the cache has them."""
    if device != "cuda":
        return nothing
    size = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    scratch = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def evict() -> None:
        scratch.zero_()

    return evict
