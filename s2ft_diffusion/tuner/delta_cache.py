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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class _Entry:
    state: list[int]
    held: list[torch.Tensor]
    tensor: torch.Tensor


class DeltaCache:
    """Tensors by owner and options, valid while the sources they were made from are as they were."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[int, Hashable], _Entry] = OrderedDict()
        self._options: dict[int, set[Hashable]] = {}
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
        options: Hashable,
        sources: Sequence[torch.Tensor],
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The tensor kept for `owner` and `options`, if its `sources` are as they were; else a new one from `make`.

        A new one is kept if the budget allows, and if all sources have version counters (tensors made under
        `torch.inference_mode` have none).
        """
        key = (id(owner), options)
        try:
            state = [value for t in sources for value in (t.data_ptr(), t._version)]
        except RuntimeError:
            return make()
        with self._lock:
            entry = self._kept.get(key)
            if entry is not None and entry.state == state:
                self._kept.move_to_end(key)
                return entry.tensor
        tensor = make()
        with self._lock:
            self._remove(key)
            if tensor.nbytes <= self._budget:
                # Holding on to the sources' memory: nothing else can appear at its address meanwhile, and what moves
                # to another type or device gets another address.
                self._kept[key] = _Entry(state, [t.detach() for t in sources], tensor)
                self.bytes += tensor.nbytes
                if id(owner) not in self._options:
                    self._options[id(owner)] = set()
                    weakref.finalize(owner, self._forget, id(owner))
                self._options[id(owner)].add(options)
                self._shrink()
        return tensor

    def drop(self, owner: object) -> None:
        """Forget what is kept for an owner."""
        if self._options.get(id(owner)):
            self._drop(id(owner))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for key in list(self._kept):
                self._remove(key)

    def _drop(self, owner: int) -> None:
        with self._lock:
            for options in list(self._options.get(owner, ())):
                self._remove((owner, options))

    def _forget(self, owner: int) -> None:
        with self._lock:
            self._drop(owner)
            self._options.pop(owner, None)

    def _remove(self, key: tuple[int, Hashable]) -> None:
        entry = self._kept.pop(key, None)
        if entry is not None:
            self.bytes -= entry.tensor.nbytes
            self._options[key[0]].discard(key[1])

    def _shrink(self) -> None:
        while self.bytes > self._budget:
            self._remove(next(iter(self._kept)))


delta_cache = DeltaCache(budget=1 << 30)
