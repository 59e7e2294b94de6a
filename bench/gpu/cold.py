"""Evicts the L2 cache, so that a step finds its inputs where a model larger than the cache has them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..timing import nothing


def evict_l2(device: str) -> Callable[[], None]:
    if device != "cuda":
        return nothing
    size = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    scratch = torch.empty(2 * size, dtype=torch.uint8, device=device)
    return lambda: scratch.zero_() and None
