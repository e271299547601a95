"""The Compare tab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from .. import compare, limits
from ..engine import Listener, Settings
from ..errors import polite
from ..limits import RequestError

if TYPE_CHECKING:
    from ..page import Page


class CompareTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                prompt = gr.Textbox(
                    self.app.prompt_of(self.page.first), label="Prompt", lines=2, max_length=limits.PROMPT_LENGTH
                )
                adapter = self.page.adapter_choice("Adapter", self.page.first)
                second = self.page.adapter_choice("Second adapter")
                strengths = gr.Textbox("0.5, 1, 1.5", label="Strengths", info="up to six, separated by commas")
                seeds = gr.Slider(1, 4, value=2, step=1, label="Seeds")
                steps, guidance, seed, scheduler = self.page.sampling()
                with gr.Row():
                    go = gr.Button("Compare", variant="primary", elem_id="compare")
                    stop = gr.Button("Cancel")
            with gr.Column(scale=6, min_width=300):
                result = gr.Image(
                    label="Side by side", format="png", interactive=False, elem_id="sheet",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
        comparison = go.click(
            polite(self.compare),
            [prompt, adapter, second, strengths, steps, guidance, seed, seeds, scheduler],
            result,
            api_name="compare",
            **self.page.busy,
        )
        self.page.cancel(stop, comparison)

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
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        """The same seeds side by side: the base, each adapter at each strength, and both together.

        Args:
            prompt: what to show.
            adapter: id of an adapter.
            second_adapter: id of another, or "".
            strengths: numbers from 0 to 1.5, separated by commas; at most six.
            steps: denoising steps, 1 to 100.
            guidance: classifier-free guidance, 0 to 30.
            seed: of the first row; each further one has the next.
            seeds: rows, 1 to 4.
            scheduler: one of the schedulers' names.
        """
        values = parse_strengths(strengths)
        settings = Settings.checked(
            prompt=prompt,
            adapters=((adapter, 1.0), (second_adapter, 1.0)),
            steps=steps,
            guidance=guidance,
            seed=seed,
            images=limits.whole("The number of seeds", seeds, (1, 4)),
            scheduler=scheduler,
        )
        if not settings.adapters:
            raise RequestError("Choose an adapter to compare.")
        columns = compare.variants(settings, self.app.library, values)

        def work(listener: Listener) -> Iterator[Image.Image]:
            yield compare.compare(self.app.engine, self.app.library, columns, listener)

        for now in self.app.running.watch(work, request.session_hash):
            if now.image is not None:
                yield now.image
                return
            progress((now.done, now.total), desc="denoising", unit="steps")
            yield gr.skip()  # here a closed page ends it
        raise RequestError("Cancelled.")


def parse_strengths(text: str) -> list[float]:
    """ "0.5, 1" to numbers; raises RequestError."""
    try:
        values = [float(part) for part in limits.text("The strengths", text, 100).replace(";", ",").split(",") if part]
    except ValueError:
        raise RequestError("The strengths must be numbers separated by commas.") from None
    if not 1 <= len(values) <= 6:
        raise RequestError("One to six strengths can be compared.")
    return [limits.number("A strength", value, limits.STRENGTH) for value in values]
