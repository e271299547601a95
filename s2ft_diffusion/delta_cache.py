"""Delta weights that are kept once made, within a byte budget.

Sampling calls every adapted layer dozens of times with the same coefficients; transforming them once is enough. What
was used longest ago is dropped first. `delta_cache.budget` is in bytes and may be changed at any time; 0 keeps nothing.

Changes of coefficients are seen by PyTorch's version counters. One that goes around them (`parameter.data.mul_(2)`) is
not: call `delta_cache.clear()` after it.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch


class DeltaCache:
    """Tensors by owner, and by the state of the sources they are made from."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[int, tuple[list[Any], list[torch.Tensor], torch.Tensor]] = OrderedDict()
        self._owners: set[int] = set()
        self._lock = threading.RLock()
        self.bytes = 0

    @property
    def budget(self) -> int:
        """Bytes that may be kept in all."""
        return self._budget

    @budget.setter
    def budget(self, value: int) -> None:
        with self._lock:
            self._budget = value
            self._shrink()

    def get(
        self,
        owner: object,
        sources: Sequence[torch.Tensor],
        make: Callable[[], torch.Tensor],
        options: object = None,
    ) -> torch.Tensor:
        """The tensor kept for `owner`, if its `sources` and `options` are as they were.

        Else a new one from `make`, kept if the budget allows.
        """
        key = id(owner)
        state = [options, *[(t.data_ptr(), t._version) for t in sources]]
        with self._lock:
            if key in self._kept and self._kept[key][0] == state:
                self._kept.move_to_end(key)
                return self._kept[key][2]
        tensor = make()
        with self._lock:
            self.drop(key)
            if tensor.nbytes <= self._budget:
                # Holding on to the sources' memory: nothing else can appear at its address meanwhile, and what moves
                # to another type or device gets another address.
                self._kept[key] = (state, [t.detach() for t in sources], tensor)
                self.bytes += tensor.nbytes
                if key not in self._owners:
                    self._owners.add(key)
                    weakref.finalize(owner, self._forget, key)
                self._shrink()
        return tensor

    def drop(self, key: int) -> None:
        """Forget what is kept for the owner with this id."""
        with self._lock:
            if key in self._kept:
                self.bytes -= self._kept.pop(key)[2].nbytes

    def _forget(self, key: int) -> None:
        self.drop(key)
        self._owners.discard(key)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def _shrink(self) -> None:
        while self.bytes > self._budget:
            self.bytes -= self._kept.popitem(last=False)[1][2].nbytes


delta_cache = DeltaCache(budget=1 << 30)
