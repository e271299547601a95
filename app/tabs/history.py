"""The History tab."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ..app import NONE, user_of
from ..errors import polite
from ..history import load_png, settings_of
from ..limits import RequestError
from .generate import filled

if TYPE_CHECKING:
    from ..page import Page


class HistoryTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row():
            refresh = gr.Button("Refresh", min_width=90, scale=0)
            use = gr.Button("Use these settings", variant="primary", min_width=140, scale=0, elem_id="use-settings")
        gallery = gr.Gallery(
            label="Made here, the newest first", format="png", columns=5, height=520, elem_id="history",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        ids, chosen = gr.JSON([], visible=False), gr.State(NONE)
        listing = {"fn": polite(self.list_history), "inputs": None, "outputs": [gallery, ids]}
        refresh.click(**listing, api_name="list_history")
        self.page.history_page.select(**listing, api_visibility="private")

        def choose(ids: list[str], event: gr.SelectData) -> str:
            return ids[event.index] if 0 <= event.index < len(ids) else NONE

        def fill(image: str, request: gr.Request) -> tuple[Any, ...]:
            return *filled(self.image_settings(image, request)), gr.Tabs(selected="generate")

        gallery.select(choose, ids, chosen, api_visibility="private", queue=False)
        use.click(polite(fill), chosen, [*self.page.generate.settings, self.page.tabs], api_visibility="private")
        gr.api(polite(self.image_settings), api_name="image_settings", queue=False)

    # What the buttons do

    def list_history(self, request: gr.Request) -> tuple[list[tuple[Image.Image, str]], list[str]]:
        """The latest images that were made here, the newest first, with their ids."""
        shown, ids = [], []
        for path in self.app.history.latest(user_of(request)):
            try:
                image = load_png(path)
                prompt = settings_of(image).prompt
            except (OSError, RequestError):
                continue
            shown.append((image, prompt[:60]))
            ids.append(path.stem)
        return shown, ids

    def image_settings(self, image: str, request: gr.Request) -> dict[str, Any]:
        """The settings that an image of the history was made with.

        Args:
            image: its id.
        """
        return json.loads(settings_of(self.app.history.open(user_of(request), image)).to_json())
