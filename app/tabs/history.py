"""The History tab: what was made here, with the settings of each picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..app import NONE, given_out, user_of
from ..engine import Settings
from ..errors import polite
from ..history import read_settings
from ..limits import RequestError
from ..words import escaped
from .parts import QUIET, reveal

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ..page import Page

NOTHING = "Choose a picture to see what it was made with."
EMPTY = "Nothing yet: what you generate is kept here."


class HistoryTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    self.kept = gr.Checkbox(False, label="Favourites only", min_width=140, elem_id="favourites")
                    self.refresh = gr.Button("Refresh", min_width=90, scale=0, elem_classes="beside")
                self.gallery = gr.Gallery(
                    label="Made here, the newest first", format="png", columns=4, height=520, elem_id="history",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
            with gr.Column(scale=3, min_width=260):
                self.about = gr.Markdown(NOTHING, elem_id="image-settings")
                with gr.Row():
                    self.use = gr.Button(
                        "Use these settings", variant="primary", interactive=False, min_width=140,
                        elem_id="use-settings",
                    )  # fmt: skip
                    self.contrast = gr.Button(
                        "Compare from this", interactive=False, min_width=140, elem_id="compare-from"
                    )
                with gr.Row():
                    self.favour = gr.Button("Favourite", interactive=False, min_width=100, elem_id="favourite")
                    self.remove = gr.Button(
                        "Delete", variant="stop", interactive=False, min_width=100, elem_id="delete-image"
                    )
        self.ids, self.chosen = gr.JSON([], visible=False), gr.State(NONE)
        self.sure = gr.Checkbox(False, visible=False)  # a state's own value never comes from the page

    def wire(self) -> None:
        for action in (self.image_settings, self.favourite_image, self.delete_image):
            gr.api(polite(action), api_name=action.__name__, queue=False)
        acting = [self.about, self.use, self.contrast, self.favour, self.remove]
        favourites = gr.Checkbox(False, visible=False)  # the list as programs ask for it
        favourites.input(polite(self.list_history), favourites, [self.gallery, self.ids], api_name="list_history")
        renewed = {"fn": polite(self.renewed), "inputs": [self.kept, self.ids, self.chosen]}
        renewed |= {"outputs": [self.gallery, self.ids, self.chosen], "trigger_mode": "always_last", **QUIET}
        showing = {"fn": polite(self.show), "inputs": self.chosen, "outputs": acting, "trigger_mode": "always_last"}
        closing = {"fn": None, "inputs": None, "outputs": None, "js": "() => s2ft.closeUnpicked()", **QUIET}

        def renew(event: Callable[..., Dependency]) -> None:
            event(**renewed).then(**showing, **QUIET).then(**closing)

        renew(self.refresh.click)
        renew(self.page.selected["history"].select)
        renew(self.kept.input)
        self.gallery.preview_close(lambda: NONE, None, self.chosen, **QUIET).then(**showing, **QUIET)

        def choose(ids: list[str], event: gr.SelectData) -> str:
            return ids[event.index] if 0 <= event.index < len(ids) else NONE

        def fill(image: str, request: gr.Request) -> tuple[Any, ...]:
            return *self.page.generate.filled(self.image_settings(image, request)), False, gr.Tabs(selected="generate")

        def contrast(image: str, request: gr.Request) -> tuple[Any, ...]:
            return self.page.compare.filled(self.image_settings(image, request))

        generate = self.page.generate
        # "multiple", here and below: while one is pending, Gradio would not hear of another; and where it hears of the
        # last ("always_last"), it has the first one's index.
        self.gallery.select(choose, self.ids, self.chosen, trigger_mode="multiple", **QUIET).then(
            **showing, **QUIET
        ).then(None, None, None, js=reveal("#image-settings"), **QUIET)
        last = {"trigger_mode": "always_last", **QUIET}
        self.use.click(polite(fill), self.chosen, [*generate.settings, generate.random, self.page.tabs], **last)
        self.contrast.click(polite(contrast), self.chosen, [*self.page.compare.settings, self.page.tabs], **last)

        def favour(image: str, request: gr.Request) -> None:
            self.favourite_image(image, request)

        renew(self.favour.click(polite(favour), self.chosen, None, trigger_mode="multiple", **QUIET).success)

        def remove(image: str, sure: bool, request: gr.Request) -> None:
            if sure is True:
                self.delete_image(image, request)

        ask = "image => [image, confirm('Delete this picture for good?')]"
        removed = self.remove.click(
            polite(remove), [self.chosen, self.sure], None, js=ask, trigger_mode="multiple", **QUIET
        )
        renew(removed.success)

    # What the buttons do

    def list_history(
        self, favourites: bool = False, request: gr.Request = None
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """The latest images that were made here, the newest first, with their ids.

        Args:
            favourites: only those that were marked.
        """
        shown, ids = [], []
        for path in self.app.history.latest(user_of(request), favourites=favourites is True):
            try:
                settings = read_settings(path)
                file = given_out(path, self.gallery)
            except (OSError, RequestError):
                continue
            mark = "★ " if self.app.history.is_favourite(path) else ""
            shown.append((file, mark + self.words(settings, self.app.history.made_at(path))))
            ids.append(path.stem)
        return shown, ids

    def image_settings(self, image: str, request: gr.Request) -> dict[str, Any]:
        """The settings that an image of the history was made with.

        Args:
            image: its id.
        """
        return json.loads(read_settings(self.app.history.find(user_of(request), image)).to_json())

    def favourite_image(self, image: str, request: gr.Request) -> bool:
        """Mark an image of the history as a favourite, or take that back; whether it is one now.

        Args:
            image: its id.
        """
        return self.app.history.favour(user_of(request), image)

    def delete_image(self, image: str, request: gr.Request) -> str:
        """Delete an image of the history.

        Args:
            image: its id.
        """
        self.app.history.delete(user_of(request), image)
        return "deleted"

    # What the page shows

    def adapter_words(self, settings: Settings) -> str:
        """The adapters with their strengths."""
        labels = self.app.library.labels()
        return (
            " + ".join(f"{labels.get(adapter, 'a lost adapter')} {s:g}" for adapter, s in settings.adapters) or "base"
        )

    def words(self, settings: Settings, when: datetime) -> str:
        """What stands under a picture: adapter, strength, seed and time."""
        return f"{self.adapter_words(settings)} · seed {settings.seed} · {when:%d %b %H:%M}"

    def renewed(self, favourites: bool, ids: list[str], chosen: str, request: gr.Request) -> tuple[Any, ...]:
        """The list anew. What is shown large stays so, or if it is gone the one in its place: that is chosen then.

        What need not change is left alone: someone may choose, or close the large view, meanwhile.
        """
        shown, now = self.list_history(favourites, request)
        if chosen not in ids:
            return shown, now, gr.skip()
        before = ids.index(chosen)
        if not now:
            return shown, now, NONE
        place = now.index(chosen) if chosen in now else min(before, len(now) - 1)
        if (place, now[place]) == (before, chosen):
            return shown, now, gr.skip()
        return gr.update(value=shown, selected_index=place), now, now[place]

    def show(self, image: str, request: gr.Request) -> tuple[Any, ...]:
        """All settings of the chosen picture, and the buttons."""
        if not image:
            there = self.app.history.latest(user_of(request), 1)
            return NOTHING if there else EMPTY, *(gr.update(interactive=False) for _ in range(4))
        path = self.app.history.find(user_of(request), image)
        settings = read_settings(path)
        facts = {
            "prompt": settings.prompt,
            "negative prompt": settings.negative_prompt,
            "adapter": self.adapter_words(settings),
            "seed": settings.seed,
            "steps": settings.steps,
            "guidance": f"{settings.guidance:g}",
            "scheduler": settings.scheduler,
            "made": f"{self.app.history.made_at(path):%d %b %Y, %H:%M:%S}",
        }
        rows = "\n".join(f"| {k} | {escaped(' '.join(str(v).split()))} |" for k, v in facts.items() if v != "")
        on = gr.update(interactive=True)
        kept = gr.update(interactive=True, value="No favourite" if self.app.history.is_favourite(path) else "Favourite")
        return f"| | |\n| --- | --- |\n{rows}", on, on, kept, on
