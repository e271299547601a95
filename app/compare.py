"""The same seeds side by side: base, adapter, other strengths, two adapters; as one labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from .engine import Engine, Listener, Settings
from .library import Library
from .words import drawn

TILE = 256
MARGIN = 8
LINE = 22


def variants(settings: Settings, library: Library, strengths: Sequence[float]) -> list[tuple[str, Settings]]:
    """Labels and settings of a comparison's columns: the base, each adapter at each strength, and both as they are."""
    columns = [("base", replace(settings, adapters=()))]
    for adapter, strength in settings.adapters:
        entry = library.get(adapter)
        name = drawn(entry.name) or f"adapter {entry.id[:4]}"
        for value in strengths or [strength]:
            columns.append((f"{name} {value:g}", replace(settings, adapters=((adapter, value),))))
    if len(settings.adapters) > 1:
        columns.append(("both", settings))
    return columns


def compare(
    engine: Engine,
    library: Library,
    columns: Sequence[tuple[str, Settings]],
    listener: Listener | None = None,
) -> Image.Image:
    """A sheet with a column a variant and a row a seed."""
    listener = listener or Listener()
    rows = columns[0][1].images
    total = len(columns) * rows * columns[0][1].steps
    pictures = []
    for number, (_, settings) in enumerate(columns):
        before = number * rows * settings.steps
        part = replace_on_step(listener, before, total)
        pictures.append(engine.generate(settings, library, part))
    return sheet([label for label, _ in columns], [columns[0][1].single(i).seed for i in range(rows)], pictures)


def replace_on_step(listener: Listener, before: int, total: int) -> Listener:
    """A listener for a part of a larger work."""
    return replace(listener, on_step=lambda done, _, preview: listener.on_step(before + done, total, preview))


def sheet(labels: Sequence[str], seeds: Sequence[int], pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Columns of pictures with their labels above and the seeds below."""
    side = max(TILE, pictures[0][0].width)
    step = side + MARGIN
    page = Image.new("RGB", (len(labels) * step + MARGIN, len(seeds) * (step + LINE) + LINE + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for column, (label, images) in enumerate(zip(labels, pictures, strict=True)):
        left = MARGIN + column * step
        draw.text((left, 4), label[:32], fill="black", font=font)
        for row, (seed, image) in enumerate(zip(seeds, images, strict=True)):
            top = LINE + MARGIN + row * (step + LINE)
            resample = Image.Resampling.BICUBIC
            page.paste(image.resize((side, side), resample) if image.width < side else image, (left, top))
            draw.text((left, top + side + 2), f"seed {seed}", fill="gray", font=font)
    return page
