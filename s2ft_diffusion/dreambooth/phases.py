"""The recipe's phases: a line when one begins, a line of summary and its seconds when it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Runs and times phases; `seconds` has them by name, in order."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a block as phase `name`; the block calls what it is given with its line of summary."""
        said: list[str] = []
        begun = time.perf_counter()
        yield said.append
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begun, 2)
        self.logger.info("%s: %s (%.1f s)", name, "; ".join(said) or "done", self.seconds[name])
