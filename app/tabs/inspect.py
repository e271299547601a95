"""The Inspect tab: what is in an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd
from PIL import Image

from .. import inspection
from ..errors import polite
from .parts import PRIVATE, QUIET, menu

if TYPE_CHECKING:
    from ..page import Page


class InspectTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        self.adapter = self.page.adapter_tiles("Adapter", self.page.first, none=False, elem_id="inspected")
        self.go = gr.Button("Inspect", variant="primary", interactive=bool(self.page.first), scale=0, elem_id="inspect")
        self.plot = gr.BarPlot(
            x="number", y="size", title="Size of each layer's weight change", height=240, tooltip="all"
        )
        self.layer = menu("Layer", visible=False, elem_id="layer")
        self.pictures = gr.Gallery(label="The layer", format="png", columns=3, height=430, elem_id="pictures")

    def wire(self) -> None:
        asked = gr.Textbox("", visible=False)  # the layer's name as programs give it: any, checked here
        shown = [self.plot, self.pictures, self.layer]
        asked.submit(polite(self.inspect), [self.adapter, asked], shown, api_name="inspect")
        self.go.click(polite(self.inspect), self.adapter, shown, trigger_mode="always_last", **PRIVATE)
        self.layer.input(
            polite(self.another_layer), [self.adapter, self.layer], shown, trigger_mode="always_last", **QUIET
        )
        self.adapter.change(lambda adapter: gr.update(interactive=bool(adapter)), self.adapter, self.go, **QUIET)

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
        return frame, inspection.pictures(entry.path, layer), gr.update(choices=names, value=layer, visible=True)

    # What the page shows

    def another_layer(self, adapter: str, layer: str) -> tuple[Any, ...]:
        """A layer's pictures. The menu stays as it is, where a further layer may have been chosen by now, unless its
        layers are another adapter's."""
        frame, pictures, menu = self.inspect(adapter, layer)
        return frame, pictures, gr.skip() if menu["value"] == layer else menu
