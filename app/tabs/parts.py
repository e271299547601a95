"""Parts that Gradio does not have, made of its HTML component: tiles, photos with words, a menu, a line of text."""

from __future__ import annotations

import base64
import io
import json
from functools import lru_cache
from typing import Any

import gradio as gr
from PIL import Image

from ..app import NONE
from ..frontend import (
    LINE_JS,
    LINE_TEMPLATE,
    MENU_JS,
    MENU_TEMPLATE,
    PHOTOS_JS,
    PHOTOS_TEMPLATE,
    TILES_JS,
    TILES_TEMPLATE,
)
from ..library import Entry

PICTURE = 128  # pixels
# Options of the page's own events: those that take a while, and those that do not.
PRIVATE = {"api_visibility": "private"}
QUIET = {**PRIVATE, "show_progress": "hidden", "queue": False}


def tiles(
    label: str,
    choices: list[dict[str, str]],
    value: Any = NONE,
    *,
    many: bool = False,
    look: str = "strip",
    **options: Any,
) -> gr.HTML:
    """Pictures of which one can be chosen (its value: an id), or several (a list of ids).

    Args:
        label: what they are.
        choices: from `tile`.
        value: what is chosen.
        many: whether several can be.
        look: "strip" or "wall".
    """
    script = f"const MANY = {json.dumps(many)}, LABEL = {json.dumps(label)}, LOOK = {json.dumps(look)};{TILES_JS}"
    return gr.HTML(
        value,
        label=label,
        choices=choices,
        html_template=TILES_TEMPLATE,
        js_on_load=script,
        apply_default_css=False,
        elem_classes="bare",
        **options,
    )


def tile(entry: Entry, label: str) -> dict[str, str]:
    """An adapter as a choice of `tiles`."""
    return {"id": entry.id, "label": label, "picture": _picture(entry), "note": entry.reason or entry.warning or ""}


@lru_cache(maxsize=4096)
def _picture(entry: Entry) -> str:
    return small(entry.picture())


def small(image: Image.Image) -> str:
    """A small copy of a picture as an address that holds it."""
    image = image.copy()
    image.thumbnail((PICTURE, PICTURE))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def photos(length: int, **options: Any) -> gr.HTML:
    """Small copies of photos (`choices`: dictionaries of "name" and "picture"), each with a field for words.

    Its value is the list of those words, of at most `length` characters each.
    """
    return gr.HTML(
        [],
        choices=[],
        html_template=PHOTOS_TEMPLATE,
        js_on_load=f"const LENGTH = {length};{PHOTOS_JS}",
        apply_default_css=False,
        elem_classes="bare",
        **options,
    )


def menu(label: str, **options: Any) -> gr.HTML:
    """A list to choose one of `choices` (strings, or dictionaries of "id" and "label") from, empty at first."""
    return gr.HTML(
        "",
        label=label,
        choices=[],
        html_template=MENU_TEMPLATE,
        js_on_load=f"const LABEL = {json.dumps(label)};{MENU_JS}",
        apply_default_css=False,
        elem_classes="bare",
        **options,
    )


def reveal(selector: str) -> str:
    """JavaScript of an event: on a narrow page, bring a part into view."""
    return f"() => window.s2ft.reveal({json.dumps(selector)})"


def line(value: str = "", *, small: bool = False, **options: Any) -> gr.HTML:
    """One line of text that screen readers are told of when it changes; it begins with "!" where it warns."""
    look = "small" if small else ""
    return gr.HTML(
        value,
        html_template=LINE_TEMPLATE,
        js_on_load=f"const LOOK = {json.dumps(look)};{LINE_JS}",
        apply_default_css=False,
        elem_classes="bare",
        **options,
    )
