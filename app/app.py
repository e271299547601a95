"""What all tabs share: the engine, the library, the history, the trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from filelock import BaseFileLock

from .engine import Engine
from .history import History
from .library import Library
from .prompts import exchanged
from .running import Running
from .training import TrainingQueue

NONE = ""  # the id of no adapter


@dataclass
class App:
    """What the page works on."""

    engine: Engine
    library: Library
    history: History
    trainings: TrainingQueue | None = None
    lock: BaseFileLock | None = None  # on the folder of outputs; let go when the app is closed

    def __post_init__(self) -> None:
        self.running = Running(self.engine.threads)

    def close(self) -> None:
        """Stop what is under way."""
        self.running.cancel_all()
        self.engine.threads.shutdown()
        if self.trainings is not None:
            self.trainings.close()
        if self.lock is not None:
            self.lock.release()

    def prompt_of(self, adapter: str) -> str:
        """An adapter's instance prompt, "" where it says none."""
        return (self.library.get(adapter).info.instance_prompt or "") if adapter else ""

    def exchanged(self, prompt: str, adapter: str, second: str = NONE) -> str:
        """The prompt for an adapter that was just chosen: what was written stays, only the trigger words change."""
        others = [entry.info.instance_prompt for entry in self.library.search() if entry.id not in (adapter, second)]
        return exchanged(prompt or "", self.prompt_of(adapter), others)

    def usable(self, adapter: str) -> bool:
        """Whether there is such an adapter, and it fits the base."""
        return any(adapter == there for _, there in self.library.choices())

    def file_name(self, adapter: str) -> str:
        """What to call a file that is about an adapter."""
        name = self.library.get(adapter).name if adapter else "base"
        return "".join(c if c.isalnum() else "-" for c in name).strip("-")[:60] or "adapter"


def given_out(path: Path, part: gr.components.Component) -> str:
    """A copy of a file that the page may give away, under the same name; Gradio removes it a day later."""
    copy = gr.processing_utils.save_file_to_cache(path, part.GRADIO_CACHE)
    part.temp_files.add(copy)
    return copy


def user_of(request: gr.Request) -> str | None:
    """Who is logged in, if there is a login."""
    return getattr(request, "username", None)
