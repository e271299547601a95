"""The Library tab: the adapters that are there, what their headers say, uploads and what can be done with them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from .. import limits
from ..app import NONE, given_out
from ..errors import plain_text, polite
from ..exports import TOOLS, export
from ..library import SORTS, Entry
from ..limits import RequestError
from ..words import escaped, shown
from .parts import QUIET, line, reveal, tile, tiles

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ..page import Page

NOTHING = "Choose an adapter to see what it is."


def details(entry: Entry, label: str | None = None) -> str:
    """The header of an adapter as Markdown."""
    title = f"## {escaped(label or entry.name)}\n\n"
    if entry.reason:
        return f"{title}Cannot be used: {escaped(entry.reason)}"
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
    warning = f"**{escaped(entry.warning[:1].upper() + entry.warning[1:])}.**\n\n" if entry.warning else ""
    return f"{title}{warning}| | |\n| --- | --- |\n{rows}"


class LibraryTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row():
            self.words = gr.Textbox(
                "", label="Search", placeholder="dog, toybox, …", scale=3, min_width=160, elem_id="search"
            )
            self.sort = gr.Radio(list(SORTS), value=SORTS[0], label="Sort", scale=6, min_width=260, elem_id="sort")
            self.look = gr.Button("Refresh", min_width=90, scale=0, elem_id="refresh", elem_classes="beside")
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.others = gr.Checkbox(
                    False, label="Also adapters for other bases", container=False, elem_id="others"
                )
                self.tiles = tiles("Adapters", self.tiles_for("", SORTS[0]), look="wall", elem_id="library")
            with gr.Column(scale=3, min_width=260):
                with gr.Row():
                    self.use = gr.Button("Use", variant="primary", interactive=False, min_width=80, elem_id="use")
                    self.download = gr.DownloadButton("Download", interactive=False, min_width=80, elem_id="download")
                self.about = gr.Markdown(NOTHING, elem_id="about")
                with gr.Row(visible=False) as self.own:
                    self.name = gr.Textbox(
                        "", label="Name", max_length=limits.WORDS_LENGTH, min_width=120, elem_id="name"
                    )
                    self.rename = gr.Button("Rename", min_width=80, scale=0, elem_id="rename", elem_classes="beside")
                    self.remove = gr.Button(
                        "Delete", variant="stop", min_width=80, scale=0, elem_id="delete", elem_classes="beside"
                    )
                with gr.Accordion("For other tools, or two in one", open=False, elem_id="export-part"):
                    self.tool = gr.Radio(list(TOOLS), value=next(iter(TOOLS)), label="As a LoRA for", elem_id="tool")
                    self.second = self.page.adapter_tiles("Merge with", elem_id="merged")
                    with gr.Row():
                        self.strength = gr.Slider(
                            *limits.STRENGTH, value=1.0, step=0.05, label="Its strength", min_width=170
                        )
                        self.second_strength = gr.Slider(
                            *limits.STRENGTH, value=1.0, step=0.05, label="The other's strength", min_width=170
                        )
                    self.export = gr.Button("Export", interactive=False, elem_id="export")
                    self.exported = line(elem_id="exported")
                    self.file = gr.DownloadButton("File", visible="hidden", elem_id="export-file")
                self.upload = gr.File(
                    label="Upload a .safetensors adapter", file_types=[".safetensors"], height=120, elem_id="upload"
                )

    def wire(self) -> None:
        gr.api(polite(self.list_adapters), api_name="list_adapters", queue=False)
        gr.api(polite(self.delete_adapter), api_name="delete_adapter", queue=False)
        gr.api(polite(self.rename_adapter), api_name="rename_adapter", queue=False)
        chosen = [self.about, self.use, self.download, self.export, self.exported, self.own, self.name]
        for event in (self.look.click, self.words.submit, self.page.selected["library"].select, self.page.blocks.load):
            self.look_again(event)
        # A text that is pasted changes without an input.
        for event in (self.words.change, self.sort.input, self.others.input):
            self.filter(event)
        self.tiles.change(polite(self.show), self.tiles, chosen, **QUIET)
        self.tiles.input(None, None, None, js=reveal("#about"), **QUIET)
        self.page.use_on(self.use, self.tiles)
        showing = {"fn": polite(self.show), "inputs": self.tiles, "outputs": chosen, **QUIET}
        renamed = self.rename.click(
            polite(self.rename_adapter), [self.tiles, self.name], None, trigger_mode="always_last", **QUIET
        )
        self.look_again(renamed.success).then(**showing)
        question = "Delete this adapter for good?"
        removed = self.remove.click(
            polite(lambda adapter: self.delete_adapter(adapter) and NONE if adapter else gr.skip()),
            self.tiles,
            self.tiles,
            js=f"adapter => confirm('{question}') ? adapter : ''",
            trigger_mode="multiple",  # who has said no may ask again while the server still hears of that
            **QUIET,
        )
        self.look_again(removed.success).then(**showing)
        self.export.click(
            lambda: ("converting …", gr.update(interactive=False)), None, [self.exported, self.export], **QUIET
        )
        exporting = self.export.click(
            polite(self.export_adapter, lambda message: (gr.skip(), f"failed: {message}")),
            [self.tiles, self.tool, self.strength, self.second, self.second_strength],
            [self.file, self.exported],
            api_name="export_adapter",
            show_progress="hidden",
            concurrency_limit=1,
            trigger_mode="multiple",  # another one may be asked for meanwhile
        )
        exporting.success(None, None, None, js="() => window.s2ft.press('#export-file')", **QUIET)
        for end in (exporting.then, exporting.failure):
            end(lambda: gr.update(interactive=True), None, self.export, **QUIET)
        record, adapter, path = gr.JSON(visible=False), gr.Textbox("", visible=False), gr.File(visible=False)
        added = self.upload.upload(
            polite(self.upload_adapter), self.upload, record, api_name="upload_adapter", trigger_mode="multiple"
        )
        self.look_again(added.success).then(self.uploaded, record, [self.tiles, self.upload], **QUIET)
        adapter.submit(polite(self.download_adapter), adapter, path, api_name="download_adapter")

    def look_again(self, event: Callable[..., Dependency]) -> Dependency:
        """After an event, show the library as it is now, in every place that shows it."""
        return self.filter(event(polite(self.refreshed), None, self.page.adapter_parts, **QUIET).then)

    def filter(self, event: Callable[..., Dependency]) -> Dependency:
        """After an event, show what the search finds."""
        return event(
            polite(lambda *asked: gr.update(choices=self.tiles_for(*asked))),
            [self.words, self.sort, self.others],
            self.tiles,
            trigger_mode="always_last",
            **QUIET,
        )

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

    def upload_adapter(self, file: str) -> dict[str, Any]:
        """Add a .safetensors adapter to the library, if it passes the strict reader and fits the base.

        Args:
            file: the file to upload.
        """
        if not file:
            raise RequestError("Choose a file first.")
        there = self.app.library.same_file(Path(file))
        entry = there or self.app.library.add(Path(file))
        if there:
            gr.Info(plain_text(f"This file is there already, as {self.app.library.labels()[there.id]}."))
        elif entry.warning:
            gr.Warning(plain_text(f"{entry.name}: {entry.warning}."))
        return {**entry.summary(), "there_already": there is not None}

    def download_adapter(self, adapter: str) -> str:
        """The file of an adapter.

        Args:
            adapter: its id.
        """
        entry = self.app.library.get(adapter)
        with tempfile.TemporaryDirectory() as folder:
            named = Path(folder) / f"{self.app.file_name(adapter)}.safetensors"
            return given_out(shutil.copyfile(entry.path, named), self.download)

    def export_adapter(
        self, adapter: str, tool: str, strength: float = 1.0, second_adapter: str = NONE, second_strength: float = 1.0
    ) -> Iterator[tuple[str, str]]:
        """An adapter as a LoRA for another tool, or two merged into one; its file, and what it is in words.

        Args:
            adapter: its id.
            tool: "ComfyUI", "A1111, Forge" or "diffusers".
            strength: 0 to 1.5: what its weight change is multiplied by.
            second_adapter: id of an adapter to merge with, or "".
            second_strength: 0 to 1.5.
        """
        wanted = [(adapter, strength), *([(second_adapter, second_strength)] if second_adapter else [])]
        parts = [(self.app.library.get(name), limits.number("A strength", s, limits.STRENGTH)) for name, s in wanted]
        if adapter == second_adapter:
            raise RequestError("The two adapters are the same one; choose another to merge with.")
        name = "-".join(self.app.file_name(name) for name, _ in wanted)
        with tempfile.TemporaryDirectory() as folder:
            path, words = export(parts, tool, self.app.engine.base, Path(folder), name)
            yield given_out(path, self.file), words

    def delete_adapter(self, adapter: str) -> str:
        """Delete an adapter that was uploaded or trained here.

        Args:
            adapter: its id.
        """
        self.app.library.delete(adapter)
        return "deleted"

    def rename_adapter(self, adapter: str, name: str) -> dict[str, Any]:
        """Give an adapter that was uploaded or trained here another name, in its file.

        Args:
            adapter: its id.
            name: what to call its subject.
        """
        return self.app.library.rename(adapter, name).summary()

    # What the page shows

    def tiles_for(self, words: str, sort: str, others: bool = False) -> list[dict[str, str]]:
        """The tiles of what a search finds, of adapters for other bases only if they are asked for."""
        found = self.app.library.search(limits.text("The search", words, 200), sort)
        labels = self.app.library.labels()
        return [tile(entry, labels[entry.id]) for entry in found if others or not entry.foreign]

    def refreshed(self) -> list[Any]:
        """The tiles of adapters of all tabs, after another look at the files."""
        self.app.library.refresh()
        return self.page.new_choices()

    def show(self, adapter: str) -> tuple[Any, ...]:
        """What is beside the tiles: words, and buttons that can act."""
        entry = next((entry for entry in self.app.library.search() if entry.id == adapter), None)
        if entry is None:
            off = gr.update(interactive=False)
            return NOTHING, off, gr.update(interactive=False, value=None), off, "", gr.update(visible=False), ""
        usable = entry.reason is None
        return (
            details(entry, self.app.library.labels()[entry.id]),
            gr.update(interactive=usable),
            gr.update(interactive=usable, value=self.download_adapter(adapter) if usable else None),
            gr.update(interactive=usable),
            "",
            gr.update(visible=self.app.library.own(entry)),
            entry.name,
        )

    def uploaded(self, record: dict[str, Any] | None) -> tuple[Any, Any]:
        """Choose what was uploaded."""
        return record["id"] if record else gr.skip(), None
