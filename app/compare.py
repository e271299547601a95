"""The same seeds side by side: base, adapters, strengths, prompts; as one labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from .engine import Engine, Listener, Settings
from .library import Library
from .words import drawn

TILE = 256
MARGIN = 8
LINE = 22


@dataclass(frozen=True)
class Column:
    """A column of a sheet: its label, and the settings of its pictures, one for each row."""

    label: str
    settings: tuple[Settings, ...]


def variants(
    settings: Settings, library: Library, strengths: Sequence[float], prompts: Sequence[str] = ()
) -> list[Column]:
    """The columns of a comparison: the base, each adapter at each strength, and two of them together.

    Args:
        settings: what all have in common; its adapters are compared, `images` is the number of seeds.
        library: where the adapters are.
        strengths: of each adapter; the one that the settings say, if there are none.
        prompts: one row for each and each seed; the settings' own, if there are none.
    """

    def column(label: str, adapters: tuple[tuple[str, float], ...]) -> Column:
        own = [
            replace(settings, prompt=prompt, adapters=adapters).single(number)
            for prompt in prompts or [settings.prompt]
            for number in range(settings.images)
        ]
        return Column(label, tuple(own))

    columns = [column("base", ())]
    labels = library.labels()
    for adapter, strength in settings.adapters:
        entry = library.get(adapter)
        name = drawn(labels[entry.id]) or f"adapter {entry.id[:4]}"
        columns += [column(f"{name} {value:g}", ((adapter, value),)) for value in strengths or [strength]]
    if len(settings.adapters) == 2:
        columns.append(column("both", settings.adapters))
    return columns


def compare(
    engine: Engine, library: Library, columns: Sequence[Column], listener: Listener | None = None
) -> Image.Image:
    """A sheet with a column for each variant and a row for each prompt and seed."""
    listener = listener or Listener()
    steps = columns[0].settings[0].steps
    rows = len(columns[0].settings)
    pictures: list[list[Image.Image]] = []
    for column in columns:
        before = len(pictures) * rows * steps
        pictures.append([])
        for number, settings in enumerate(column.settings):
            part = listener.part(before + number * steps, len(columns) * rows * steps)
            pictures[-1] += engine.generate(settings, library, part)
    several = len({settings.prompt for settings in columns[0].settings}) > 1
    below = [
        f"seed {settings.seed}" + (f" · {drawn(settings.prompt)}" if several else "")
        for settings in columns[0].settings
    ]
    return sheet([column.label for column in columns], below, pictures)


def sheet(labels: Sequence[str], below: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Columns of pictures with their labels above and a line below each picture."""
    side = max(TILE, pictures[0][0].width)
    step = side + MARGIN
    page = Image.new("RGB", (len(labels) * step + MARGIN, len(below) * (step + LINE) + LINE + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for column, (label, images) in enumerate(zip(labels, pictures, strict=True)):
        left = MARGIN + column * step
        draw.text((left, 4), _fitting(label, font, side), fill="black", font=font)
        for row, (words, image) in enumerate(zip(below, images, strict=True)):
            top = LINE + MARGIN + row * (step + LINE)
            resample = Image.Resampling.BICUBIC
            page.paste(image.resize((side, side), resample) if image.width < side else image, (left, top))
            draw.text((left, top + side + 2), _fitting(words, font, side), fill="dimgray", font=font)
    return page


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a text as a column has room for."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
