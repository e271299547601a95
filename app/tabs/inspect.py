"""The Inspect tab."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr
import pandas as pd
from PIL import Image

from .. import inspection
from ..errors import polite

if TYPE_CHECKING:
    from ..page import Page


class InspectTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        with gr.Row():
            adapter = self.page.adapter_choice("Adapter", self.page.first)
            layer = gr.Dropdown([], label="Layer", value="", allow_custom_value=True)
            go = gr.Button(
                "Inspect", variant="primary", min_width=120, scale=0, elem_id="inspect", elem_classes="beside"
            )
        plot = gr.BarPlot(x="number", y="size", title="Size of each layer's weight change", height=240, tooltip="all")
        pictures = gr.Gallery(label="The layer", format="png", columns=3, height=430, elem_id="pictures")
        gr.on(
            [go.click, layer.input],
            polite(self.inspect),
            [adapter, layer],
            [plot, pictures, layer],
            api_name="inspect",
        )
        adapter.input(lambda: "", None, layer, api_visibility="private", queue=False)

    # What the buttons do

    def inspect(self, adapter: str, layer: str = "") -> tuple[pd.DataFrame, list[tuple[Image.Image, str]], dict]:
        """What is in an adapter: the size of each layer's weight change, and one layer's pictures.

        Args:
            adapter: its id.
            layer: "component.module"; "" for the layer with the largest change.
        """
        entry = self.app.library.get(adapter)
        sizes = inspection.energies(entry.path)
        names = [name for name, _ in sizes]
        layer = layer if layer in names else max(sizes, key=lambda pair: pair[1])[0]
        rounded = [round(size, 4) for _, size in sizes]
        frame = pd.DataFrame({"number": range(1, len(names) + 1), "layer": names, "size": rounded})
        return frame, inspection.pictures(entry.path, layer), gr.update(choices=names, value=layer)
