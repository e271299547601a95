"""Generations under way: each in the engine's threads, watched from the request that asked for it, and cancelled."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .engine import Cancelled, Listener

SHOW_EVERY = 2.0  # seconds between what is shown of a generation under way


@dataclass(frozen=True)
class Moment:
    """Steps done, steps in all, and a preview or a finished image."""

    done: int
    total: int
    preview: Image.Image | None = None
    image: Image.Image | None = None


@dataclass
class Running:
    """What every session is generating at this moment."""

    threads: Executor
    _cancels: dict[tuple[str, str], set[threading.Event]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(
        self, work: Callable[[Listener], Iterator[Image.Image]], session: str | None, kind: str = ""
    ) -> Iterator[Moment]:
        """Run a generation in another thread; ends without an error when it is cancelled.

        Args:
            work: yields the images.
            session: whose it is.
            kind: what it is called, so that it can be cancelled and what else the session is making goes on.

        The thread gives its pipeline back by itself, whatever becomes of the page that asked. Of quick steps only some
        are passed on: showing each would take longer than making it.
        """
        events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        cancel = threading.Event()
        key = (session or secrets.token_hex(8), kind)
        with self._lock:
            self._cancels.setdefault(key, set()).add(cancel)
        shown = 0.0

        def on_step(done: int, total: int, preview: Callable[[], Image.Image]) -> None:
            nonlocal shown
            if time.monotonic() - shown >= SHOW_EVERY:
                shown = time.monotonic()
                events.put(("step", (done, total, preview())))

        def run() -> None:
            try:
                for image in work(Listener(on_step=on_step, cancelled=cancel.is_set)):
                    events.put(("image", image))
                events.put(("end", None))
            except BaseException as error:
                events.put(("error", error))

        self.threads.submit(run)
        done, total = 0, 1
        try:
            while True:
                kind, value = events.get()
                if kind == "step":
                    done, total, preview = value
                    yield Moment(done, total, preview=preview)
                elif kind == "image":
                    yield Moment(done, total, image=value)
                elif kind == "end" or isinstance(value, Cancelled):
                    return
                else:
                    raise value
        finally:
            cancel.set()
            with self._lock:
                self._cancels[key].discard(cancel)
                if not self._cancels[key]:
                    del self._cancels[key]

    @property
    def under_way(self) -> int:
        """How many generations there are."""
        with self._lock:
            return sum(map(len, self._cancels.values()))

    def cancel(self, session: str | None, kind: str | None = None) -> bool:
        """Stop what a session is generating, all of it or one kind; whether there was anything."""
        return self._stop(lambda key: key[0] == session and kind in (None, key[1]))

    def cancel_all(self) -> None:
        self._stop(lambda key: True)

    def _stop(self, wanted: Callable[[tuple[str, str]], bool]) -> bool:
        with self._lock:
            events = [event for key, found in self._cancels.items() if wanted(key) for event in found]
        for event in events:
            event.set()
        return bool(events)
