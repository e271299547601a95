"""The page: its tabs, and what several of them have in common."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import gradio as gr
from gradio.events import Dependency

from s2ft_diffusion import toybox

from . import limits
from .app import NONE, App
from .engine import SCHEDULERS
from .errors import polite
from .tabs.compare import CompareTab
from .tabs.generate import GenerateTab
from .tabs.history import HistoryTab
from .tabs.inspect import InspectTab
from .tabs.library import LibraryTab
from .tabs.train import TrainTab

TITLE = "S²FT adapters"
GENERATION = "generation"  # what everything shares that needs a pipeline


def theme() -> gr.themes.Base:
    """System fonts, so that nothing is fetched from elsewhere, and quiet colours."""
    sans = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)


class Page:
    """Builds the page; components that several tabs touch are attributes."""

    def __init__(self, app: App, *, concurrency: int = 1) -> None:
        self.app = app
        self.busy = {"concurrency_limit": concurrency, "concurrency_id": GENERATION}
        self.adapters: list[gr.Dropdown] = []
        guidance = 4.0 if toybox.is_embedded(app.engine.base) else 7.5
        self.defaults = {"steps": 25, "guidance": guidance, "seed": 0, "scheduler": "DDIM"}
        choices = app.library.choices()
        self.first = choices[0][1] if choices else NONE

    def build(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400)) as self.blocks:
            gr.HTML(
                f"<h1>{TITLE}</h1><p>Adapters of about a megabyte on "
                f"<b>{self.app.engine.base.rstrip('/').rsplit('/', 1)[-1]}</b>.</p>",
                elem_id="masthead",
            )
            with gr.Tabs() as self.tabs:
                with gr.Tab("Generate", id="generate"):
                    self.generate = GenerateTab(self)
                    self.generate.build()
                with gr.Tab("Library", id="library"):
                    library = LibraryTab(self)
                    library.build()
                with gr.Tab("Compare", id="compare"):
                    CompareTab(self).build()
                if self.app.trainings is not None:
                    with gr.Tab("Train", id="train"):
                        TrainTab(self).build()
                with gr.Tab("Inspect", id="inspect"):
                    InspectTab(self).build()
                with gr.Tab("History", id="history") as self.history_page:
                    HistoryTab(self).build()
            library.wire()
        return self.blocks

    # Parts

    def adapter_choice(self, label: str, value: str = NONE, **options: Any) -> gr.Dropdown:
        """A dropdown of adapters; its choices follow the library. Ids are checked by us, not by the first choices."""
        dropdown = gr.Dropdown(self.app.choices(), value=value, label=label, allow_custom_value=True, **options)
        self.adapters.append(dropdown)
        return dropdown

    def sampling(self) -> tuple[gr.Slider, gr.Slider, gr.Number, gr.Dropdown]:
        """Steps, guidance, seed with a dice, scheduler."""
        with gr.Row():
            steps = gr.Slider(*limits.STEPS, value=self.defaults["steps"], step=1, label="Steps", min_width=120)
            guidance = gr.Slider(
                *limits.GUIDANCE, value=self.defaults["guidance"], step=0.5, label="Guidance", min_width=120
            )
        with gr.Row():
            seed = gr.Number(
                self.defaults["seed"], label="Seed", precision=0, minimum=0, maximum=limits.SEEDS - 1, min_width=100
            )
            dice = gr.Button("🎲", min_width=44, scale=0, elem_classes="beside")
            scheduler = gr.Dropdown(
                list(SCHEDULERS), value=self.defaults["scheduler"], label="Scheduler", min_width=120
            )
        dice.click(lambda: random.randrange(limits.SEEDS), None, seed, api_visibility="private", queue=False)
        return steps, guidance, seed, scheduler

    # What several tabs take part in

    def cancel(self, button: gr.Button, event: Dependency) -> Dependency:
        """Have a button stop an event, running or still waiting for its turn."""

        def stop(request: gr.Request) -> None:
            self.app.running.cancel(
                request.session_hash
            )  # at its next step; an event is let go only between what it shows

        return button.click(polite(stop), None, None, cancels=event, api_visibility="private", queue=False)

    def new_choices(self) -> list[Any]:
        """The library's adapters for every dropdown of adapters."""
        update = partial(gr.update, choices=self.app.choices())
        return [update() for _ in self.adapters]
