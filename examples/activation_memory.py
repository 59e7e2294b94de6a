"""How many bytes of activations are alive at once while something runs, counted tensor by tensor."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ActivationMemory(TorchDispatchMode):
    """Counts what operations allocate while it is active; `peak` is the most that was alive at once, in bytes.

    Memory that existed before, as parameters and inputs, is not counted, nor is what an operation needs inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage(), before)
        self.peak = max(self.peak, self.alive)
        return results

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self._known:
            return
        self.alive += storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.alive -= size
