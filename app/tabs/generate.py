"""The Generate tab."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from .. import limits
from ..app import NONE, user_of
from ..engine import Listener, Settings
from ..errors import polite
from ..limits import RequestError

if TYPE_CHECKING:
    from ..page import Page


def filled(values: dict[str, Any]) -> tuple[Any, ...]:
    """An image's settings as values for the Generate tab's controls, in their order."""
    adapters = [*values["adapters"], *[[NONE, 1.0], [NONE, 0.5]][len(values["adapters"]) :]]
    return (
        values["prompt"], values["negative_prompt"], *adapters[0], *adapters[1], values["steps"],
        values["guidance"], values["seed"], values["images"], values["scheduler"],
    )  # fmt: skip


class GenerateTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.prompt = gr.Textbox(
                    self.app.prompt_of(self.page.first),
                    label="Prompt",
                    lines=2,
                    max_length=limits.PROMPT_LENGTH,
                    elem_id="prompt",
                )
                self.adapter = self.page.adapter_choice("Adapter", self.page.first, elem_id="adapter")
                self.strength = gr.Slider(*limits.STRENGTH, value=1.0, step=0.05, label="Strength", elem_id="strength")
                with gr.Row():
                    self.go = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.stop = gr.Button("Cancel", elem_id="cancel")
                with gr.Accordion("Mix in a second adapter", open=False):
                    self.second = self.page.adapter_choice("Second adapter")
                    self.second_strength = gr.Slider(*limits.STRENGTH, value=0.5, step=0.05, label="Its strength")
                with gr.Accordion("More", open=False):
                    self.images = gr.Slider(*limits.IMAGES, value=1, step=1, label="Images", elem_id="images")
                    self.steps, self.guidance, self.seed, self.scheduler = self.page.sampling()
                    self.negative = gr.Textbox("", label="Negative prompt", max_length=limits.PROMPT_LENGTH)
            with gr.Column(scale=6, min_width=300):
                self.results = gr.Gallery(
                    label="Images", format="png", columns=2, fit_columns=False, height="auto", elem_id="results",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                with gr.Row():
                    self.preview = gr.Image(
                        label="Under way", format="png", height=130, min_width=130, interactive=False,
                        elem_id="preview", buttons=[],
                    )  # fmt: skip
                    with gr.Column(min_width=130):
                        self.status = gr.Textbox(label="Status", interactive=False, elem_id="status", max_lines=1)
                        again = gr.Button("Use these settings", elem_id="again")
        made, chosen = gr.State([]), gr.State(-1)  # settings of the images shown; the one chosen among them
        self.settings = [
            self.prompt, self.negative, self.adapter, self.strength, self.second, self.second_strength, self.steps,
            self.guidance, self.seed, self.images, self.scheduler,
        ]  # fmt: skip
        generation = gr.on(
            [self.go.click, self.prompt.submit],
            polite(self.generate),
            self.settings,
            [self.preview, self.results, self.status, made],
            api_name="generate",
            show_progress="full",
            show_progress_on=self.preview,
            **self.page.busy,
        )
        self.page.cancel(self.stop, generation).then(
            lambda now: (None, now if now and now.startswith(("done", "cancelled")) else "cancelled"),
            self.status,
            [self.preview, self.status],
            api_visibility="private",
            queue=False,
        )
        gr.api(polite(self.cancel), api_name="cancel", queue=False)

        def choose(event: gr.SelectData) -> int:
            return event.index

        def use(made: list[str], chosen: int) -> tuple[Any, ...]:
            if not made:
                raise RequestError("There is no image yet.")
            return filled(json.loads(made[chosen if chosen < len(made) else -1]))

        self.results.select(choose, None, chosen, api_visibility="private", queue=False)
        again.click(polite(use), [made, chosen], self.settings, api_visibility="private")
        self.adapter.input(
            polite(lambda adapter: self.app.prompt_of(adapter) or gr.skip()),
            self.adapter,
            self.prompt,
            api_visibility="private",
        )

    # What the buttons do

    def generate(
        self,
        prompt: str,
        negative_prompt: str,
        adapter: str,
        strength: float,
        second_adapter: str,
        second_strength: float,
        steps: float,
        guidance: float,
        seed: float,
        images: float,
        scheduler: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio wants it)
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Generate images, each a PNG that carries its settings.

        Args:
            prompt: what to show.
            negative_prompt: what not to show.
            adapter: id of an adapter, or "" for the base alone.
            strength: 0 to 1.5.
            second_adapter: id of an adapter to mix in, or "".
            second_strength: 0 to 1.5.
            steps: denoising steps, 1 to 100.
            guidance: classifier-free guidance, 0 to 30.
            seed: of the first image; each further one has the next.
            images: 1 to 8.
            scheduler: one of the schedulers' names.
        """
        settings = Settings.checked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            adapters=((adapter, strength), (second_adapter, second_strength)),
            steps=steps,
            guidance=guidance,
            seed=seed,
            images=images,
            scheduler=scheduler,
        )
        made: list[tuple[str, str]] = []  # files, so that showing an image again does not encode it again
        signatures: list[str] = []
        user = user_of(request)

        def work(listener: Listener) -> Iterator[Image.Image]:
            return self.app.engine.iterate(settings, self.app.library, listener)

        for now in self.app.running.watch(work, request.session_hash):
            if now.image is None:
                progress((now.done, now.total), desc="denoising", unit="steps")
                yield now.preview, gr.skip(), f"step {now.done} of {now.total}", gr.skip()
                continue
            self.app.history.save(now.image, user)
            file = gr.processing_utils.save_pil_to_cache(
                now.image, str(self.app.downloads), name=f"image-{len(made)}", format="png"
            )
            made.append((file, f"seed {settings.single(len(made)).seed}"))
            signatures.append(now.image.info["s2ft"])
            if len(made) < settings.images:  # shown at once: should the page cancel the event, it has no last word
                yield gr.skip(), made, gr.skip(), signatures
        status = "done" if len(made) == settings.images else f"cancelled, {len(made)} of {settings.images} images"
        yield None, made, status, signatures

    def cancel(self, request: gr.Request) -> str:
        """Stop what this session is generating or comparing; images that are finished stay."""
        return "cancelled" if self.app.running.cancel(request.session_hash) else "nothing to cancel"
