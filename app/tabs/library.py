"""The Library tab."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from .. import limits
from ..app import NONE
from ..errors import polite
from ..library import SORTS, Entry
from ..limits import RequestError
from ..words import escaped, shown

if TYPE_CHECKING:
    from ..page import Page


def caption(entry: Entry) -> str:
    """What stands below an adapter's tile."""
    if entry.reason:
        return f"{entry.name} · {entry.reason}"
    return f"{entry.name} · {entry.bytes / 1e6:.2f} MB"


def details(entry: Entry) -> str:
    """The header of an adapter as Markdown."""
    if entry.reason:
        return f"### {escaped(entry.name)}\n\nCannot be used: {escaped(entry.reason)}"
    facts = {
        "prompt": entry.info.instance_prompt,
        "class": entry.info.class_name,
        "base": entry.info.base_model,
        "trained": entry.info.date,
        "size": f"{entry.bytes:,} bytes",
        "trainable numbers": f"{entry.trainable:,}",
        "steps": entry.info.training.get("steps"),
    }
    rows = "\n".join(f"| {key} | {escaped(shown(str(value)))} |" for key, value in facts.items() if value is not None)
    return f"### {escaped(entry.name)}\n\n| | |\n| --- | --- |\n{rows}"


class LibraryTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app
        self._copies: dict[tuple[str, int, float], str] = {}

    def build(self) -> None:
        with gr.Row():
            self.words = gr.Textbox("", label="Search", placeholder="dog, toybox, …", scale=3, min_width=160)
            self.sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort", min_width=120)
            self.look = gr.Button("Refresh", min_width=90, scale=0, elem_id="refresh", elem_classes="beside")
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.tiles = gr.Gallery(
                    label="Adapters", format="png", columns=3, height=480, allow_preview=False, buttons=[],
                    elem_id="library",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=260):
                self.about = gr.Markdown("Choose an adapter to see what its header says.", elem_id="about")
                with gr.Row():
                    self.use = gr.Button("Use", variant="primary", min_width=80, elem_id="use")
                    self.download = gr.Button("Download", min_width=80, elem_id="prepare")
                self.file = gr.File(label="Download", visible=False, interactive=False, elem_id="download")
                self.upload = gr.File(
                    label="Upload a .safetensors adapter", file_types=[".safetensors"], height=120, elem_id="upload"
                )
        self.ids = gr.State([])
        self.chosen = gr.State(NONE)

        def choose(ids: list[str], event: gr.SelectData) -> tuple[str, str]:
            adapter = ids[event.index] if 0 <= event.index < len(ids) else NONE
            return adapter, self.details(adapter)

        generate = self.page.generate

        def use(adapter: str) -> tuple[Any, Any, Any]:
            return adapter, self.app.prompt_of(adapter) or gr.skip(), gr.Tabs(selected="generate")

        self.tiles.select(choose, self.ids, [self.chosen, self.about], api_visibility="private", queue=False)
        self.use.click(
            polite(use), self.chosen, [generate.adapter, generate.prompt, self.page.tabs], api_visibility="private"
        )
        self.download.click(
            polite(lambda adapter: gr.File(self.download_adapter(adapter), visible=True)),
            self.chosen,
            self.file,
            api_visibility="private",
        )

    def wire(self) -> None:
        quiet = {"api_visibility": "private"}

        def look(words: str, sort: str) -> list[Any]:
            return [*self.gallery(words, sort), *self.page.new_choices()]

        looking = [polite(look), [self.words, self.sort], [self.tiles, self.ids, *self.page.adapters]]
        for event in (self.look.click, self.words.submit, self.sort.input, self.page.blocks.load):
            event(*looking, **quiet)
        record, adapter, path = gr.JSON(visible=False), gr.Textbox("", visible=False), gr.File(visible=False)
        self.upload.upload(polite(self.upload_adapter), self.upload, record, api_name="upload_adapter").success(
            *looking, **quiet
        )
        adapter.submit(polite(self.download_adapter), adapter, path, api_name="download_adapter")
        gr.api(polite(self.list_adapters), api_name="list_adapters", queue=False)

    # What the buttons do

    def list_adapters(self, words: str = "", sort: str = "newest") -> list[dict[str, Any]]:
        """The adapters that are there, by what their headers say; looks for new files first.

        Args:
            words: only adapters in whose name, subject, prompt or base all these words occur.
            sort: "newest", "name", "smallest" or "fewest numbers".
        """
        self.app.library.refresh()
        found = self.app.library.search(limits.text("The search", words, 200), sort)
        return [entry.summary() for entry in found]

    def gallery(self, words: str, sort: str) -> tuple[list[tuple[Image.Image, str]], list[str]]:
        """The library's tiles with captions, and their ids."""
        self.app.library.refresh()
        found = self.app.library.search(limits.text("The search", words, 200), sort)
        return [(entry.picture(), caption(entry)) for entry in found], [entry.id for entry in found]

    def details(self, adapter: str) -> str:
        """An adapter's header as Markdown; also of one that cannot be used."""
        found = [entry for entry in self.app.library.search() if entry.id == adapter]
        return details(found[0]) if found else ""

    def upload_adapter(self, file: str) -> dict[str, Any]:
        """Add a .safetensors adapter to the library, if it passes the strict reader and fits the base.

        Args:
            file: the file to upload.
        """
        if not file:
            raise RequestError("Choose a file first.")
        return self.app.library.add(Path(file)).summary()

    def download_adapter(self, adapter: str) -> str:
        """The file of an adapter.

        Args:
            adapter: its id.
        """
        entry = self.app.library.get(adapter)
        if entry.state not in self._copies:
            folder = Path(tempfile.mkdtemp(dir=self.app.downloads))
            safe = "".join(c if c.isalnum() else "-" for c in entry.name).strip("-")[:60] or "adapter"
            self._copies[entry.state] = str(shutil.copyfile(entry.path, folder / f"{safe}.safetensors"))
        return self._copies[entry.state]
