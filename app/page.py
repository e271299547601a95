"""The page: its tabs, and what several of them have in common."""

from __future__ import annotations

import html
import json
from typing import Any

import gradio as gr
from gradio.events import Dependency

from . import limits
from .app import NONE, App
from .engine import OWN, Engine
from .errors import polite
from .library import base_name
from .tabs.compare import CompareTab
from .tabs.generate import GenerateTab
from .tabs.history import HistoryTab
from .tabs.inspect import InspectTab
from .tabs.library import LibraryTab
from .tabs.parts import QUIET, tile, tiles
from .tabs.train import TrainTab

TITLE = "S²FT adapters"
GENERATION = "generation"  # what everything shares that needs a pipeline
# How the address calls what is chosen on the Generate tab, in the order of its settings.
ADDRESS = (
    "prompt", "negative", "adapter", "strength", "second", "second_strength", "steps", "guidance", "seed", "images",
    "scheduler", "lines",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """System fonts, so that nothing is fetched from elsewhere, and quiet colours."""
    sans = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    kind = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)
    # Gradio's own subdued and primary colours have too little contrast for small letters.
    return kind.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover_dark="#991b1b",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def size_words(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def memory_words(engine: Engine) -> str:
    """How much memory the base's weights take, and where, and the most that was in use."""
    packed = f" in {engine.quantize}" if engine.quantize else ""
    place = "CPU" if engine.device == "cpu" else "GPU"
    place = "offloaded to host memory" if engine.offload else f"on the {place}"
    return f"{size_words(engine.weights_bytes)} of weights{packed} {place}, peak memory {size_words(engine.peak_bytes)}"


class Page:
    """Builds the page; components that several tabs touch are attributes."""

    def __init__(self, app: App, *, concurrency: int = 1) -> None:
        self.app = app
        self.busy = {"concurrency_limit": concurrency, "concurrency_id": GENERATION}
        self.adapters: list[tuple[gr.HTML, bool]] = []  # tiles of adapters, and whether "none" is among them
        usual, scheduler = app.engine.usual, app.engine.schedulers[0]
        self.defaults = {"steps": usual.steps, "guidance": usual.guidance, "seed": 0, "scheduler": scheduler}
        self.first = self.first_adapter()  # what the page begins with

    def build(self) -> gr.Blocks:
        tabs = {"generate": GenerateTab, "library": LibraryTab, "compare": CompareTab, "train": TrainTab,
                "inspect": InspectTab, "history": HistoryTab}  # fmt: skip
        if self.app.trainings is None:
            del tabs["train"]
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400)) as self.blocks:
            self.masthead = gr.HTML(self.masthead_words(), elem_id="masthead")
            with gr.Tabs() as self.tabs:
                self.selected: dict[str, gr.Tab] = {}
                for name, kind in tabs.items():
                    with gr.Tab(name.capitalize(), id=name) as self.selected[name]:
                        setattr(self, name, kind(self))
                        getattr(self, name).build()
            for name in tabs:
                getattr(self, name).wire()
            self.wire_address()
        return self.blocks

    # Parts

    def masthead_words(self) -> str:
        """The base, and what it takes in memory."""
        base = html.escape(base_name(self.app.engine.base))
        return f"<h1>{TITLE}</h1><p>on <b>{base}</b>, {memory_words(self.app.engine)}</p>"

    def adapter_tiles(self, label: str, value: Any = NONE, *, none: bool = True, **options: Any) -> gr.HTML:
        """Tiles of the adapters that can be used, which follow the library."""
        part = tiles(label, self.choices(none=none), value, **options)
        self.adapters.append((part, none))
        return part

    def choices(self, *, none: bool) -> list[dict[str, str]]:
        """The adapters that can be used, for tiles."""
        labels = self.app.library.labels()
        usable = [tile(entry, labels[entry.id]) for entry in self.app.library.search(sort="name") if not entry.reason]
        return [{"id": NONE, "label": "none", "picture": "", "note": "the base alone"}, *usable] if none else usable

    def sampling(self) -> tuple[gr.Slider, gr.Slider, gr.Radio]:
        """Steps, guidance, scheduler; of a scheduler without a choice nothing is shown."""
        with gr.Row():
            steps = gr.Slider(*limits.STEPS, value=self.defaults["steps"], step=1, label="Steps", min_width=170)
            guidance = gr.Slider(
                *limits.GUIDANCE, value=self.defaults["guidance"], step=0.5, label="Guidance", min_width=170
            )
        schedulers = [("the base's own" if name == OWN else name, name) for name in self.app.engine.schedulers]
        return (
            steps,
            guidance,
            gr.Radio(schedulers, value=schedulers[0][1], label="Scheduler", visible=len(schedulers) > 1),
        )

    # What several tabs take part in

    def first_adapter(self) -> str:
        """The adapter to begin with, if there is one."""
        choices = self.app.library.choices()
        return choices[0][1] if choices else NONE

    @property
    def adapter_parts(self) -> list[gr.HTML]:
        """All tiles of adapters."""
        return [part for part, _ in self.adapters]

    def new_choices(self) -> list[Any]:
        """The library's adapters for all tiles of adapters."""
        choices = {none: self.choices(none=none) for none in (True, False)}
        return [gr.update(choices=choices[none]) for _, none in self.adapters]

    def use(self, adapter: str, prompt: str, second: str) -> tuple[Any, ...]:
        """An adapter and its prompt for the Generate tab, which comes to the front."""
        return adapter, self.app.exchanged(prompt, adapter, second), gr.Tabs(selected="generate")

    def use_on(self, button: gr.Button, adapter: gr.State) -> Dependency:
        """Have a button take an adapter to the Generate tab."""
        generate = self.generate
        return button.click(
            polite(self.use),
            [adapter, generate.prompt, generate.second],
            [generate.adapter, generate.prompt, self.tabs],
            trigger_mode="always_last",
            **QUIET,
        )

    # The address

    def wire_address(self) -> None:
        """Keep the tab and what is chosen on the Generate tab in the address, and read them from there."""
        generate = self.generate
        state = [*generate.settings, generate.random]
        defaults = {name: part.value for name, part in zip(ADDRESS, generate.settings, strict=True)}
        names = json.dumps([*ADDRESS, "random"])
        script = (
            f"(...values) => {{const now = Object.fromEntries({names}.map((name, i) => [name, values[i]])); "
            "const random = now.random; delete now.random; if (now.adapter === '') now.adapter = 'none'; "
            f"window.s2ft.remember({json.dumps(defaults)}, now, random);}}"
        )
        gr.on([part.change for part in state], None, state, None, js=script, **QUIET)
        for name, tab in self.selected.items():
            tab.select(None, None, None, js=f"() => {{window.s2ft.tab('{name}')}}", **QUIET)
        back = gr.Button("Back", visible="hidden", elem_id="go-back")
        wanted = f"() => window.s2ft.wanted({json.dumps(list(self.selected))})"
        back.click(None, None, self.tabs, js=wanted, **QUIET)

        loading = self.blocks.load(self.read_address, None, [*state, self.tabs], **QUIET)
        self.blocks.load(self.masthead_words, None, self.masthead, **QUIET)
        loading.then(None, None, None, js="() => {window.s2ft.ready = true}", **QUIET)

    def read_address(self, request: gr.Request) -> tuple[Any, ...]:
        """What a link says, in the order of `ADDRESS`, whether the seed is random, and the tab."""
        query = dict(request.query_params)
        tab = query.get("tab")
        shown = gr.Tabs(selected=tab) if tab in self.selected else gr.skip()
        prompt, negative, adapter, *others = self.generate.from_address(query)
        if "adapter" not in query and not self.app.usable(self.first):  # it has been deleted, or there was none
            adapter = self.first_adapter()
        if "prompt" not in query and isinstance(adapter, str):
            prompt = self.app.prompt_of(adapter) or gr.skip()
        return prompt, negative, adapter, *others, shown
