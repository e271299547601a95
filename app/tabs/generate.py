"""The Generate tab: what to show, the pictures of it, and the settings of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from .. import limits
from ..app import NONE, user_of
from ..engine import Listener, Settings
from ..errors import polite
from ..frontend import UNLESS_TYPED
from ..history import load_png, settings_of
from ..library import base_name
from ..limits import RequestError
from ..prompts import differing
from ..words import shown
from .parts import QUIET, line

if TYPE_CHECKING:
    from ..page import Page

ENABLED, DISABLED = {"__type__": "update", "interactive": True}, {"__type__": "update", "interactive": False}


def step_words(done: int, steps: int, images: int) -> str:
    """ "step 3 of 25", and of which image where there are several."""
    number, step = divmod(max(done - 1, 0), steps)
    which = f", image {number + 1} of {images}" if images > 1 else ""
    return f"step {step + 1} of {steps}{which}"


def not_begun(status: str) -> Any:
    """What is shown where the server took no more requests, or could not be reached."""
    return "failed: too much is waiting; try again" if status == "queued" else gr.skip()


class GenerateTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row(elem_id="stage"):
            with gr.Column(elem_id="ask", min_width=260):
                self.adapter = self.page.adapter_tiles("Adapter", self.page.first, elem_id="adapter")
                self.prompt = gr.Textbox(
                    self.app.prompt_of(self.page.first),
                    label="Prompt",
                    lines=2,
                    max_length=limits.PROMPT_LENGTH,
                    placeholder="What to show. Shift+Enter generates.",
                    elem_id="prompt",
                )
                self.tokens = line(self.token_words(self.app.prompt_of(self.page.first)), small=True, elem_id="tokens")
                with gr.Row():
                    self.seed = gr.Number(self.page.defaults["seed"], label="Seed", min_width=110, elem_id="seed")
                    self.random = gr.Checkbox(
                        True, label="Random", info="another one each time", min_width=110, elem_id="random"
                    )
                with gr.Row():
                    self.go = gr.Button("Generate", variant="primary", min_width=100, elem_id="generate")
                    self.stop = gr.Button("Cancel", interactive=False, min_width=80, elem_id="cancel")
            with gr.Column(elem_id="frame", min_width=280):
                with gr.Column(elem_id="canvas"):
                    self.results = gr.Gallery(
                        label="Images", format="png", columns=2, fit_columns=False, height="auto",
                        object_fit="contain", show_label=False, elem_id="results", buttons=["download", "fullscreen"],
                    )  # fmt: skip
                    self.preview = gr.Image(
                        label="Under way", format="png", show_label=False, container=False, interactive=False,
                        elem_id="preview", buttons=[],
                    )  # fmt: skip
                self.status = line(elem_id="status")
                with gr.Row():
                    self.again = gr.Button("Use these settings", interactive=False, min_width=140, elem_id="again")
                    self.contrast = gr.Button("Compare from this", interactive=False, min_width=140)
            with gr.Column(elem_id="rest", min_width=260):
                self.strength = gr.Slider(*limits.STRENGTH, value=1.0, step=0.05, label="Strength", elem_id="strength")
                with gr.Accordion("Mix in a second adapter", open=False):
                    self.second = self.page.adapter_tiles("Second adapter", elem_id="second")
                    self.second_strength = gr.Slider(*limits.STRENGTH, value=0.5, step=0.05, label="Its strength")
                with gr.Accordion("More", open=False):
                    self.images = gr.Slider(*limits.IMAGES, value=1, step=1, label="Images", elem_id="images")
                    self.each_line = gr.Checkbox(
                        False, label="Each line is a prompt of its own", info=f"at most {limits.LINES}", elem_id="lines"
                    )
                    self.steps, self.guidance, self.scheduler = self.page.sampling()
                    self.negative = gr.Textbox(
                        "", label="Negative prompt", max_length=limits.PROMPT_LENGTH,
                        visible=self.app.engine.family.negative_prompt is not None,
                    )  # fmt: skip
                self.restored = gr.File(
                    label="A picture made here, to have its settings back",
                    file_types=[".png"], height=110, elem_id="restore",
                )  # fmt: skip
        self.proposal = gr.JSON([], visible=False)  # the prompt as it was, and as a chosen adapter wants it
        self.made = gr.State({"wanted": 0, "images": [], "settings": []})
        self.chosen = gr.State(0)  # which of the images shown
        self.settings = [
            self.prompt, self.negative, self.adapter, self.strength, self.second, self.second_strength, self.steps,
            self.guidance, self.seed, self.images, self.scheduler, self.each_line,
        ]  # fmt: skip

    def wire(self) -> None:
        gr.api(polite(self.cancel), api_name="cancel", queue=False)
        gr.api(polite(self.count_tokens), api_name="count_tokens", queue=False)
        start = gr.on(
            [self.go.click, self.prompt.submit],
            None,
            [self.random, self.seed, self.status],
            [self.seed, self.status, self.go, self.stop],
            js="(random, seed, status) => window.s2ft.start(random, seed, status)",
            **QUIET,
        )
        shown = [self.preview, self.results, self.status, self.made, self.chosen]
        generation = start.then(
            polite(self.generate, lambda message: (None, gr.skip(), f"failed: {message}", gr.skip(), gr.skip())),
            self.settings,
            shown,
            api_name="generate",
            show_progress="hidden",
            **self.page.busy,
        )
        ended = [self.go, self.stop, self.again, self.contrast]
        generation.failure(not_begun, self.status, self.status, **QUIET)
        for end in (generation.then, generation.failure):
            end(self.ended, self.made, ended, **QUIET).then(self.page.masthead_words, None, self.page.masthead, **QUIET)
        self.stop.click(
            self.stopped, [self.status, self.made], [*shown[:3], *ended], cancels=generation, **QUIET
        )  # an event is let go only between what it shows; the engine is told too

        def choose(event: gr.SelectData) -> int:
            return event.index

        def use(made: dict[str, Any], chosen: int) -> tuple[Any, ...]:
            return *self.filled(self.settings_at(made, chosen)), False

        self.results.select(choose, None, self.chosen, trigger_mode="multiple", **QUIET)
        last = {"trigger_mode": "always_last", **QUIET}
        self.again.click(polite(use), [self.made, self.chosen], [*self.settings, self.random], **last)
        self.contrast.click(
            polite(lambda made, chosen: self.page.compare.filled(self.settings_at(made, chosen))),
            [self.made, self.chosen],
            [*self.page.compare.settings, self.page.tabs],
            **last,
        )
        self.adapter.input(
            polite(self.proposed),
            [self.prompt, self.adapter, self.second],
            self.proposal,
            trigger_mode="always_last",
            **QUIET,
        ).success(None, [self.proposal, self.prompt], self.prompt, js=UNLESS_TYPED, **QUIET)
        gr.on(
            [self.prompt.change, self.negative.change, self.each_line.change],
            self.token_words,
            [self.prompt, self.negative, self.each_line],
            self.tokens,
            trigger_mode="always_last",
            **QUIET,
        )
        self.restored.upload(
            polite(self.restore), self.restored, [*self.settings, self.random, self.status, self.restored], **QUIET
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
        each_line: bool,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
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
            seed: of the first image; each further one has the next. -1 is a random one.
            images: 1 to 8, for each prompt.
            scheduler: one of the schedulers' names.
            each_line: whether each line of `prompt` is a prompt of its own.
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
        prompts = limits.lines("prompts", settings.prompt) if each_line is True else [settings.prompt]
        wishes = [replace(settings, prompt=prompt) for prompt in prompts]
        told_apart = dict(zip(prompts, differing(prompts), strict=True))
        wanted = len(wishes) * settings.images
        made: dict[str, Any] = {"wanted": wanted, "images": [], "settings": []}
        subject = self.app.file_name(settings.adapters[0][0] if settings.adapters else NONE)

        def work(listener: Listener) -> Iterator[Image.Image]:
            total = wanted * settings.steps
            for number, wish in enumerate(wishes):
                before = number * settings.images * settings.steps
                yield from self.app.engine.iterate(wish, self.app.library, listener.part(before, total))

        chosen: Any = 0  # with the first thing shown, which takes the place of the last pictures
        for now in self.app.running.watch(work, request.session_hash, "generate"):
            if now.image is None:
                results = gr.skip() if made["images"] else []
                yield now.preview, results, step_words(now.done, settings.steps, wanted), made, chosen
                chosen = gr.skip()
                continue
            self.app.history.save(now.image, user_of(request))
            own = settings_of(now.image)
            file = gr.processing_utils.save_pil_to_cache(
                now.image, self.results.GRADIO_CACHE, name=f"{subject}-{own.seed}", format="png"
            )
            self.results.temp_files.add(file)
            words = f"seed {own.seed}"
            if len(wishes) > 1:
                words = f"{told_apart.get(own.prompt, own.prompt)} · {words}"
            made["images"].append((file, words))  # a file, so that showing it again does not encode it again
            made["settings"].append(now.image.info["s2ft"])
            if len(made["images"]) < wanted:  # shown at once: should the page cancel the event, it has no last word
                yield gr.skip(), made["images"], gr.skip(), made, chosen
                chosen = gr.skip()
        yield None, made["images"] or gr.skip(), self.last_words(made), made, chosen if made["images"] else gr.skip()

    @staticmethod
    def last_words(made: dict[str, Any]) -> str:
        """How a generation ended."""
        count, wanted = len(made["images"]), made["wanted"]
        if count == wanted:
            return "done"
        return f"cancelled with {count} of {wanted} images" if wanted > 1 else "cancelled"

    def cancel(self, request: gr.Request) -> str:
        """Stop what this session is generating or comparing; images that are finished stay."""
        return "cancelled" if self.app.running.cancel(request.session_hash) else "nothing to cancel"

    def count_tokens(self, prompt: str) -> dict[str, Any]:
        """How many tokens a prompt has, how many the text encoder reads, and the words that it does not read.

        Args:
            prompt: what to show.
        """
        count, limit, unread = self.app.engine.tokens(limits.text("The prompt", prompt, limits.PROMPT_LENGTH))
        return {"tokens": count, "limit": limit, "unread": unread}

    # What the page shows

    def proposed(self, prompt: str, adapter: str, second: str) -> list[str]:
        """What is written, and what to have instead for an adapter that was just chosen."""
        return [prompt, self.app.exchanged(prompt, adapter, second)]

    def token_words(self, prompt: str, negative_prompt: str = "", each_line: bool = False) -> str:
        """The line under the prompt, which also says what is not read, of the negative one too."""
        prompts = [line for line in prompt.splitlines() if line.strip()] if each_line is True else []
        try:
            counts = [self.count_tokens(words) for words in prompts or [prompt]]
            negative = self.count_tokens(negative_prompt)
        except RequestError as error:
            return f"!{error}"
        longest = max(counts, key=lambda count: count["tokens"])
        if not longest["limit"]:
            return ""
        said = f"{longest['tokens']} of {longest['limit']} tokens" + (" in the longest line" if len(counts) > 1 else "")
        unread = [f"“{count['unread']}” is not read" for count in counts if count["unread"]]
        unread += [f"“{negative['unread']}” of the negative prompt is not read"] if negative["unread"] else []
        return f"!{said}: {'; '.join(unread)}" if unread else said

    def stopped(self, status: str, made: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """What is shown when Cancel was clicked: of one that was waiting, of one under way."""
        self.app.running.cancel(request.session_hash, "generate")
        if status and status.startswith("step"):
            status = self.last_words(made)
        elif status == "queued":  # what is there is of the one before
            return None, gr.skip(), "cancelled before it began", *self.ended(made)
        return None, made["images"] or gr.skip(), status, *self.ended(made)

    def ended(self, made: dict[str, Any]) -> tuple[Any, ...]:
        """The buttons when nothing is under way."""
        there = gr.update(interactive=bool(made["images"]))
        return gr.update(interactive=True), gr.update(interactive=False), there, there

    def settings_at(self, made: dict[str, Any], chosen: int) -> dict[str, Any]:
        """The settings of an image that is shown."""
        if not made["settings"]:
            raise RequestError("There is no image yet.")
        return json.loads(made["settings"][chosen if chosen < len(made["settings"]) else -1])

    def filled(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """An image's settings as values for the controls, in the order of `settings`; what is not here is left out."""
        adapters = [pair for pair in values["adapters"] if self.app.usable(pair[0])]
        adapters += [[NONE, 1.0], [NONE, 0.5]][len(adapters) :]
        negative = "" if self.app.engine.family.negative_prompt is None else values["negative_prompt"]
        return (
            values["prompt"], negative, *adapters[0], *adapters[1], values["steps"], values["guidance"],
            values["seed"], values["images"], self.app.engine.scheduler(values["scheduler"]), False,
        )  # fmt: skip

    def restore(self, file: str) -> tuple[Any, ...]:
        """The settings of a PNG that was made here, into the controls."""
        try:
            image = load_png(Path(file))
            settings = settings_of(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            said = str(error) if isinstance(error, RequestError) else "This is not a PNG that can be read."
            raise RequestError(said) from None
        base = base_name(self.app.engine.base)
        made_on = str(image.info.get("s2ft_base", base))
        lost = "" if all(self.app.usable(adapter) for adapter, _ in settings.adapters) else "its adapter is not here"
        if made_on != base:
            words = f"!that picture was made on {shown(made_on)}: on {base} it will be another one"
            words += f"; {lost}" if lost else ""
        else:
            words = f"!{lost} any more" if lost else "these are the settings of that picture"
        return *self.filled(json.loads(settings.to_json())), False, words, None

    def from_address(self, query: dict[str, str]) -> tuple[Any, ...]:
        """Values for the controls from a link, `gr.skip()` for what it does not say or says wrongly."""
        known = {
            "prompt": lambda v: limits.text("", v, limits.PROMPT_LENGTH),
            "negative": lambda v: (
                "" if self.app.engine.family.negative_prompt is None else limits.text("", v, limits.PROMPT_LENGTH)
            ),
            "adapter": lambda v: self.app.library.get(v).id if v != "none" else NONE,
            "strength": lambda v: limits.number("", float(v), limits.STRENGTH),
            "second": lambda v: self.app.library.get(v).id,
            "second_strength": lambda v: limits.number("", float(v), limits.STRENGTH),
            "steps": lambda v: limits.whole("", float(v), limits.STEPS),
            "guidance": lambda v: limits.number("", float(v), limits.GUIDANCE),
            "seed": lambda v: limits.whole("", float(v), (0, limits.SEEDS - 1)),
            "images": lambda v: limits.whole("", float(v), limits.IMAGES),
            "scheduler": lambda v: {name: name for name in self.app.engine.schedulers}[v],
            "lines": lambda v: v == "true",
        }
        found = {}
        for name, read in known.items():
            try:
                found[name] = read(query[name]) if name in query else gr.skip()
            except (ValueError, KeyError):
                found[name] = gr.skip()
        return *found.values(), False if isinstance(found["seed"], int) else gr.skip()
