"""The Compare tab: the same seeds with several adapters, strengths and prompts, as one sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from .. import compare, limits
from ..engine import Listener, Settings
from ..errors import polite
from ..limits import RequestError
from .generate import not_begun, step_words
from .parts import QUIET, line

if TYPE_CHECKING:
    from ..page import Page


class CompareTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        first = [self.page.first] if self.page.first else []
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self.adapters = self.page.adapter_tiles(
                    "Adapters, one or more", first, none=False, many=True, elem_id="compared"
                )
                self.prompt = gr.Textbox(
                    self.app.prompt_of(self.page.first),
                    label="Prompts, one a line",
                    lines=2,
                    max_length=limits.PROMPT_LENGTH,
                    placeholder="Shift+Enter compares.",
                    elem_id="compare-prompt",
                )
                self.strengths = gr.Textbox(
                    "0.5, 1, 1.5", label="Strengths", info="up to six, separated by commas", elem_id="strengths"
                )
                with gr.Row():
                    self.seed = gr.Number(
                        self.page.defaults["seed"], label="Seed", info="-1: a random one", min_width=100
                    )
                    self.seeds = gr.Slider(1, 4, value=2, step=1, label="Seeds", min_width=120)
                with gr.Row():
                    self.go = gr.Button("Compare", variant="primary", interactive=bool(first), elem_id="compare")
                    self.stop = gr.Button("Cancel", interactive=False, elem_id="cancel-compare")
                with gr.Accordion("More", open=False):
                    self.steps, self.guidance, self.scheduler = self.page.sampling()
            with gr.Column(scale=6, min_width=300):
                self.result = gr.Image(
                    label="Side by side", format="png", show_label=False, interactive=False, min_width=280,
                    elem_id="sheet", buttons=["download", "fullscreen"],
                )  # fmt: skip
                self.status = line(elem_id="compare-status")
        self.settings = [
            self.prompt, self.adapters, self.strengths, self.steps, self.guidance, self.seed, self.seeds,
            self.scheduler,
        ]  # fmt: skip

    def wire(self) -> None:
        shown = [self.result, self.status]
        options = {"show_progress": "hidden", **self.page.busy}
        failed = lambda message: (gr.skip(), f"failed: {message}")  # noqa: E731
        start = gr.on(
            [self.go.click, self.prompt.submit],
            None,
            self.status,
            [self.status, self.go, self.stop],
            js="status => window.s2ft.begin('#compare', '#compare-status', status)",
            **QUIET,
        )
        comparison = start.then(
            polite(self.compare_grid, failed), self.settings, shown, api_name="compare_grid", **options
        )
        comparison.failure(not_begun, self.status, self.status, **QUIET)
        for end in (comparison.then, comparison.failure):
            end(self.ended, self.adapters, [self.go, self.stop], **QUIET)
        self.stop.click(
            self.stopped, [self.status, self.adapters], [self.status, self.go, self.stop], cancels=comparison, **QUIET
        )
        able = "chosen => window.s2ft.able('#cancel-compare', (chosen || []).length > 0)"
        self.adapters.change(None, self.adapters, self.go, js=able, **QUIET)
        # The endpoint as programs know it: one adapter or two.
        adapter, second = gr.Textbox(self.page.first, visible=False), gr.Textbox("", visible=False)
        adapter.submit(
            polite(self.compare),
            [self.prompt, adapter, second, *self.settings[2:]],
            self.result,
            api_name="compare",
            **options,
        )

    # What the buttons do

    def compare(
        self,
        prompt: str,
        adapter: str,
        second_adapter: str,
        strengths: str,
        steps: float,
        guidance: float,
        seed: float,
        seeds: float,
        scheduler: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """The same seeds side by side: the base, each adapter at each strength, and both together.

        Args:
            prompt: what to show.
            adapter: id of an adapter.
            second_adapter: id of another, or "".
            strengths: numbers from 0 to 1.5, separated by commas; at most six.
            steps: denoising steps, 1 to 100.
            guidance: classifier-free guidance, 0 to 30.
            seed: of the first row; each further one has the next. -1 is a random one.
            seeds: rows, 1 to 4.
            scheduler: one of the schedulers' names.
        """
        adapters = [name for name in (adapter, second_adapter) if name]
        for sheet, _ in self.compare_grid(
            prompt, adapters, strengths, steps, guidance, seed, seeds, scheduler, request
        ):
            yield sheet

    def compare_grid(
        self,
        prompts: str,
        adapters: list[str],
        strengths: str,
        steps: float,
        guidance: float,
        seed: float,
        seeds: float,
        scheduler: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, str]]:
        """The same prompts and seeds side by side: the base, and each adapter at each strength; of two, both together.

        Args:
            prompts: what to show, one a line.
            adapters: ids of adapters.
            strengths: numbers from 0 to 1.5, separated by commas; at most six.
            steps: denoising steps, 1 to 100.
            guidance: classifier-free guidance, 0 to 30.
            seed: of the first row; each further one has the next. -1 is a random one.
            seeds: rows a prompt, 1 to 4.
            scheduler: one of the schedulers' names.
        """
        if not isinstance(adapters, Sequence) or isinstance(adapters, str) or not all(adapters) or not adapters:
            raise RequestError("Choose an adapter to compare.")
        settings = Settings.checked(
            prompt=prompts,
            adapters=tuple((adapter, 1.0) for adapter in adapters),
            steps=steps,
            guidance=guidance,
            seed=seed,
            images=limits.whole("The number of seeds", seeds, (1, 4)),
            scheduler=scheduler,
        )
        lines = limits.lines("prompts", settings.prompt)
        columns = compare.variants(settings, self.app.library, parse_strengths(strengths), lines)
        count = len(columns) * len(columns[0].settings)
        if count > limits.SHEET:
            raise RequestError(f"A sheet of {count} images is too large; at most {limits.SHEET} are made.")

        def work(listener: Listener) -> Iterator[Image.Image]:
            yield compare.compare(self.app.engine, self.app.library, columns, listener)

        for now in self.app.running.watch(work, request.session_hash, "compare"):
            if now.image is not None:
                yield now.image, "done"
                return
            yield gr.skip(), step_words(now.done, settings.steps, count)  # here a closed page ends it
        yield gr.skip(), "cancelled"

    # What the page shows

    def stopped(self, status: str, adapters: list[str], request: gr.Request) -> tuple[Any, ...]:
        """What is shown when Cancel was clicked; the last sheet stays."""
        self.app.running.cancel(request.session_hash, "compare")
        return "cancelled" if status.startswith(("queued", "step")) else status, *self.ended(adapters)

    def ended(self, adapters: list[str]) -> tuple[Any, Any]:
        """The buttons when nothing is under way."""
        return gr.update(interactive=bool(adapters)), gr.update(interactive=False)

    def filled(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """An image's settings for the controls, in the order of `settings`, and the tab."""
        adapters = [adapter for adapter, _ in values["adapters"] if self.app.usable(adapter)]
        strengths = sorted({0.5, 1.0, *(strength for _, strength in values["adapters"])})
        return (
            values["prompt"], adapters, ", ".join(f"{value:g}" for value in strengths), values["steps"],
            values["guidance"], values["seed"], 1, self.app.engine.scheduler(values["scheduler"]),
            gr.Tabs(selected="compare"),
        )  # fmt: skip


def parse_strengths(text: str) -> list[float]:
    """ "0.5, 1" to numbers; raises RequestError."""
    try:
        values = [float(part) for part in limits.text("The strengths", text, 100).replace(";", ",").split(",") if part]
    except ValueError:
        raise RequestError("The strengths must be numbers separated by commas.") from None
    if not 1 <= len(values) <= 6:
        raise RequestError("One to six strengths can be compared.")
    return [limits.number("A strength", value, limits.STRENGTH) for value in values]
