"""The page: tabs of Gradio's own parts, wired to the endpoints in `actions.py`."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import Any

import gradio as gr
from gradio.events import Dependency

from s2ft_diffusion import toybox

from . import limits
from .actions import NONE, App, polite
from .engine import SCHEDULERS
from .library import SORTS
from .limits import RequestError

TITLE = "S²FT adapters"
GENERATION = "generation"  # what everything shares that needs a pipeline
CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: auto}
#masthead {padding: 4px 2px 0}
#masthead h1 {font-size: 1.5rem; margin: 0}
#masthead p {margin: 0; color: var(--body-text-color-subdued)}
.beside {align-self: flex-end; height: 44px}
footer {display: none !important}
@media (max-width: 640px) {
  .gradio-container, .gradio-container .app {padding: 8px !important}
  #masthead h1 {font-size: 1.2rem}
}
"""


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
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86_400)) as blocks:
            gr.HTML(
                f"<h1>{TITLE}</h1><p>Adapters of about a megabyte on "
                f"<b>{self.app.engine.base.rstrip('/').rsplit('/', 1)[-1]}</b>.</p>",
                elem_id="masthead",
            )
            with gr.Tabs() as self.tabs:
                with gr.Tab("Generate", id="generate"):
                    self.generate_tab()
                with gr.Tab("Library", id="library"):
                    self.library_tab()
                with gr.Tab("Compare", id="compare"):
                    self.compare_tab()
                if self.app.trainings is not None:
                    with gr.Tab("Train", id="train"):
                        self.train_tab(blocks)
                with gr.Tab("Inspect", id="inspect"):
                    self.inspect_tab()
                with gr.Tab("History", id="history") as self.history_page:
                    self.history_tab()
            self.wire(blocks)
        return blocks

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

    # Tabs

    def generate_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.prompt = gr.Textbox(
                    self.app.prompt_of(self.first),
                    label="Prompt",
                    lines=2,
                    max_length=limits.PROMPT_LENGTH,
                    elem_id="prompt",
                )
                self.adapter = self.adapter_choice("Adapter", self.first, elem_id="adapter")
                self.strength = gr.Slider(*limits.STRENGTH, value=1.0, step=0.05, label="Strength", elem_id="strength")
                with gr.Row():
                    self.go = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.stop = gr.Button("Cancel", elem_id="cancel")
                with gr.Accordion("Mix in a second adapter", open=False):
                    self.second = self.adapter_choice("Second adapter")
                    self.second_strength = gr.Slider(*limits.STRENGTH, value=0.5, step=0.05, label="Its strength")
                with gr.Accordion("More", open=False):
                    self.images = gr.Slider(*limits.IMAGES, value=1, step=1, label="Images", elem_id="images")
                    self.steps, self.guidance, self.seed, self.scheduler = self.sampling()
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
            polite(self.app.generate),
            self.settings,
            [self.preview, self.results, self.status, made],
            api_name="generate",
            show_progress="full",
            show_progress_on=self.preview,
            **self.busy,
        )
        self.cancel(self.stop, generation).then(
            lambda now: (None, now if now and now.startswith(("done", "cancelled")) else "cancelled"),
            self.status,
            [self.preview, self.status],
            api_visibility="private",
            queue=False,
        )
        gr.api(polite(self.app.cancel), api_name="cancel", queue=False)

        def choose(event: gr.SelectData) -> int:
            return event.index

        def use(made: list[str], chosen: int) -> tuple[Any, ...]:
            if not made:
                raise RequestError("There is no image yet.")
            return self.filled(json.loads(made[chosen if chosen < len(made) else -1]))

        self.results.select(choose, None, chosen, api_visibility="private", queue=False)
        again.click(polite(use), [made, chosen], self.settings, api_visibility="private")
        self.adapter.input(
            polite(lambda adapter: self.app.prompt_of(adapter) or gr.skip()),
            self.adapter,
            self.prompt,
            api_visibility="private",
        )

    def library_tab(self) -> None:
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
            return adapter, self.app.details(adapter)

        def use(adapter: str) -> tuple[Any, Any, Any]:
            return adapter, self.app.prompt_of(adapter) or gr.skip(), gr.Tabs(selected="generate")

        self.tiles.select(choose, self.ids, [self.chosen, self.about], api_visibility="private", queue=False)
        self.use.click(polite(use), self.chosen, [self.adapter, self.prompt, self.tabs], api_visibility="private")
        self.download.click(
            polite(lambda adapter: gr.File(self.app.download_adapter(adapter), visible=True)),
            self.chosen,
            self.file,
            api_visibility="private",
        )

    def compare_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                prompt = gr.Textbox(
                    self.app.prompt_of(self.first), label="Prompt", lines=2, max_length=limits.PROMPT_LENGTH
                )
                adapter = self.adapter_choice("Adapter", self.first)
                second = self.adapter_choice("Second adapter")
                strengths = gr.Textbox("0.5, 1, 1.5", label="Strengths", info="up to six, separated by commas")
                seeds = gr.Slider(1, 4, value=2, step=1, label="Seeds")
                steps, guidance, seed, scheduler = self.sampling()
                with gr.Row():
                    go = gr.Button("Compare", variant="primary", elem_id="compare")
                    stop = gr.Button("Cancel")
            with gr.Column(scale=6, min_width=300):
                result = gr.Image(
                    label="Side by side", format="png", interactive=False, elem_id="sheet",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
        comparison = go.click(
            polite(self.app.compare),
            [prompt, adapter, second, strengths, steps, guidance, seed, seeds, scheduler],
            result,
            api_name="compare",
            **self.busy,
        )
        self.cancel(stop, comparison)

    def train_tab(self, blocks: gr.Blocks) -> None:
        small = toybox.is_embedded(self.app.engine.base)
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                photos = gr.File(
                    label="3 to 20 photos", file_count="multiple", file_types=["image"], height=170, elem_id="photos"
                )
                with gr.Row():
                    subject = gr.Textbox(label="Name of the subject", placeholder="mittens", elem_id="subject")
                    kind = gr.Textbox(label="What it is", placeholder="cat", elem_id="kind")
                steps = gr.Slider(*limits.TRAIN_STEPS, value=500, step=10, label="Steps", elem_id="train-steps")
                numbers = gr.Slider(
                    *limits.TRAIN_NUMBERS, value=8000, step=100, label="Trainable numbers a layer", elem_id="numbers"
                )
                with gr.Row():
                    go = gr.Button("Train", variant="primary", elem_id="train")
                    stop = gr.Button("Cancel", interactive=False, elem_id="cancel-training")
                words = "about a minute on two cores" if small else "minutes on a GPU, hours on a CPU"
                gr.Markdown(f"The prompt becomes *a photo of sks …*. It takes {words}; one training at a time.")
            with gr.Column(scale=5, min_width=300):
                report = gr.Markdown("No training yet.", elem_id="training")
                curve = gr.LinePlot(x="step", y="loss", title="Loss, smoothed", height=220)
                samples = gr.Gallery(label="Samples", format="png", columns=2, height=220, buttons=["download"])
        timer = gr.Timer(1.0, active=False)
        latest = gr.State("")  # always the latest job of whoever looks
        status = gr.JSON(visible=False)
        shown = [report, curve, samples, timer, stop]
        show = polite(self.app.show_training)
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        go.click(
            polite(self.app.train),
            [photos, subject, kind, steps, numbers],
            status,
            api_name="train",
            concurrency_limit=1,  # the photos of one request at a time are in memory
        ).success(show, latest, shown, **quiet)
        stop.click(
            polite(self.app.cancel_training), latest, status, api_name="stop", api_visibility="private", queue=False
        ).success(show, latest, shown, **quiet)
        # A job that has ended has a new adapter in the library.
        timer.tick(show, latest, shown, **quiet).then(self.new_choices, None, self.adapters, **quiet)
        blocks.load(show, latest, shown, **quiet)
        gr.api(polite(self.app.training_status), api_name="training_status", queue=False)
        gr.api(polite(self.app.cancel_training), api_name="cancel_training", queue=False)

    def inspect_tab(self) -> None:
        with gr.Row():
            adapter = self.adapter_choice("Adapter", self.first)
            layer = gr.Dropdown([], label="Layer", value="", allow_custom_value=True)
            go = gr.Button(
                "Inspect", variant="primary", min_width=120, scale=0, elem_id="inspect", elem_classes="beside"
            )
        plot = gr.BarPlot(x="number", y="size", title="Size of each layer's weight change", height=240, tooltip="all")
        pictures = gr.Gallery(label="The layer", format="png", columns=3, height=430, elem_id="pictures")
        gr.on(
            [go.click, layer.input],
            polite(self.app.inspect),
            [adapter, layer],
            [plot, pictures, layer],
            api_name="inspect",
        )
        adapter.input(lambda: "", None, layer, api_visibility="private", queue=False)

    def history_tab(self) -> None:
        with gr.Row():
            refresh = gr.Button("Refresh", min_width=90, scale=0)
            use = gr.Button("Use these settings", variant="primary", min_width=140, scale=0, elem_id="use-settings")
        gallery = gr.Gallery(
            label="Made here, the newest first", format="png", columns=5, height=520, elem_id="history",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        ids, chosen = gr.JSON([], visible=False), gr.State(NONE)
        listing = {"fn": polite(self.app.list_history), "inputs": None, "outputs": [gallery, ids]}
        refresh.click(**listing, api_name="list_history")
        self.history_page.select(**listing, api_visibility="private")

        def choose(ids: list[str], event: gr.SelectData) -> str:
            return ids[event.index] if 0 <= event.index < len(ids) else NONE

        def fill(image: str, request: gr.Request) -> tuple[Any, ...]:
            return *self.filled(self.app.image_settings(image, request)), gr.Tabs(selected="generate")

        gallery.select(choose, ids, chosen, api_visibility="private", queue=False)
        use.click(polite(fill), chosen, [*self.settings, self.tabs], api_visibility="private")
        gr.api(polite(self.app.image_settings), api_name="image_settings", queue=False)

    # What several tabs take part in

    @staticmethod
    def filled(values: dict[str, Any]) -> tuple[Any, ...]:
        """An image's settings as values for the Generate tab's controls, in their order."""
        adapters = [*values["adapters"], *[[NONE, 1.0], [NONE, 0.5]][len(values["adapters"]) :]]
        return (
            values["prompt"], values["negative_prompt"], *adapters[0], *adapters[1], values["steps"],
            values["guidance"], values["seed"], values["images"], values["scheduler"],
        )  # fmt: skip

    def cancel(self, button: gr.Button, event: Dependency) -> Dependency:
        """Have a button stop an event, running or still waiting for its turn."""

        def stop(request: gr.Request) -> None:
            self.app.cancel(request)  # at its next step; an event is let go only between what it shows

        return button.click(polite(stop), None, None, cancels=event, api_visibility="private", queue=False)

    def new_choices(self) -> list[Any]:
        """The library's adapters for every dropdown of adapters."""
        update = partial(gr.update, choices=self.app.choices())
        return [update() for _ in self.adapters]

    def wire(self, blocks: gr.Blocks) -> None:
        quiet = {"api_visibility": "private"}

        def look(words: str, sort: str) -> list[Any]:
            return [*self.app.gallery(words, sort), *self.new_choices()]

        looking = [polite(look), [self.words, self.sort], [self.tiles, self.ids, *self.adapters]]
        for event in (self.look.click, self.words.submit, self.sort.input, blocks.load):
            event(*looking, **quiet)
        record, adapter, path = gr.JSON(visible=False), gr.Textbox("", visible=False), gr.File(visible=False)
        self.upload.upload(polite(self.app.upload_adapter), self.upload, record, api_name="upload_adapter").success(
            *looking, **quiet
        )
        adapter.submit(polite(self.app.download_adapter), adapter, path, api_name="download_adapter")
        gr.api(polite(self.app.list_adapters), api_name="list_adapters", queue=False)
