"""The recipe's phases, on the screen and in a file that others can follow.

`progress.jsonl` in the output folder has one JSON object a line, in order: `{"phase": name}` when one begins,
`{"phase", "summary", "seconds"}` when it ends, `{"step", "steps", "loss", "lr"}` for every optimizer step and
`{"images": [paths]}` for samples. A resumed run goes on at its end.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRESS_NAME = "progress.jsonl"


class Phases:
    """Runs and times phases; `seconds` has them by name, in order. Without a file, nothing is written."""

    def __init__(self, logger: logging.Logger, file: Path | None = None, *, anew: bool = True) -> None:
        self.logger, self.file = logger, file
        self.seconds: dict[str, float] = {}
        if file is not None and anew:
            file.unlink(missing_ok=True)
        elif file is not None and file.exists():  # a disk that was full may have cut the last line
            whole = file.read_bytes().rpartition(b"\n")
            os.truncate(file, len(whole[0] + whole[1]))

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a block as phase `name`; the block calls what it is given with its line of summary."""
        said: list[str] = []
        begun = time.perf_counter()
        self.note(phase=name)
        yield said.append
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begun, 2)
        summary = "; ".join(said) or "done"
        self.logger.info("%s: %s (%.1f s)", name, summary, self.seconds[name])
        self.note(phase=name, summary=summary, seconds=self.seconds[name])

    def note(self, **event: Any) -> None:
        """Append one event to the file."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(event) + "\n")
