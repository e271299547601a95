"""Scores of a set of images by the encoders, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid

from . import metrics
from .encoders import Encoders
from .prompts import Prompt

COLUMNS = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "lpips": "LPIPS ↑",
    "drift_lpips": "drift LPIPS ↓",
    "drift_clip": "drift CLIP ↓",
}


@dataclass
class Scores:
    """One row of a table; None where a number has no meaning (the real photos have no prompt and no drift).

    `dino`, `clip_i`: likeness to the subject. `clip_t`: to the prompt. `lpips`: diversity among images of a prompt.
    `drift_lpips`, `drift_clip`: how far images that do not name the subject have moved from the base's.
    """

    dino: float | None = None
    clip_i: float | None = None
    clip_t: float | None = None
    lpips: float | None = None
    drift_lpips: float | None = None
    drift_clip: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def score_images(
    encoders: Encoders, real: Sequence[Image.Image], made: Mapping[Prompt, Sequence[Image.Image]]
) -> Scores:
    """Scores of generated images, by prompt, of the subject that `real` shows. Drift is left out."""
    images = [image for found in made.values() for image in found]
    texts = encoders.clip.texts([prompt.plain for prompt in made])
    texts = texts.repeat_interleave(torch.tensor([len(found) for found in made.values()]), dim=0)
    clip = encoders.clip.images(images)
    diversity = [metrics.mean_among(encoders.lpips.among(found)) for found in made.values() if len(found) > 1]
    return Scores(
        dino=metrics.mean_pairwise_cosine(encoders.dino.images(images), encoders.dino.images(real)),
        clip_i=metrics.mean_pairwise_cosine(clip, encoders.clip.images(real)),
        clip_t=metrics.mean_matched_cosine(clip, texts),
        lpips=sum(diversity) / len(diversity) if diversity else None,
    )


def score_real(encoders: Encoders, real: Sequence[Image.Image], side: int | None = None) -> Scores:
    """The RealImages row: the subject's photos among themselves; for LPIPS as squares of at most `side` pixels, such as
    generated images have."""
    if len(real) < 2:
        return Scores()
    side = min(side or real[0].width, *(min(image.size) for image in real))
    squares = [transforms.center_crop(transforms.resize(image, side), [side, side]) for image in real]
    return Scores(
        dino=metrics.mean_cosine_among(encoders.dino.images(real)),
        clip_i=metrics.mean_cosine_among(encoders.clip.images(real)),
        lpips=metrics.mean_among(encoders.lpips.among(squares)),
    )


def add_drift(scores: Scores, encoders: Encoders, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> None:
    """Fill in the drift from images of the base, and of the adapted model at the same prompts and seeds."""
    scores.drift_lpips = float(encoders.lpips(before, after).mean())
    scores.drift_clip = metrics.mean_shift(encoders.clip.images(before), encoders.clip.images(after))


def markdown(rows: Mapping[str, Scores], encoders: Mapping[str, str]) -> str:
    """Rows as a Markdown table that says by which encoders they were scored."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, scores in rows.items():
        cells = ("–" if value is None else f"{value:.3f}" for value in scores.to_json().values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    used = ", ".join(f"{key.upper()}: {name}" for key, name in encoders.items())
    return "\n".join([*lines, "", f"Encoders: {used}."])


def contact_sheet(rows: Sequence[Sequence[Image.Image]], path: Path, side: int = 128) -> None:
    """Write rows of images as one PNG, each image `side` pixels wide and high."""
    columns = max(len(row) for row in rows)
    blank = torch.ones(3, side, side)
    tiles = []
    for row in rows:
        squares = [transforms.center_crop(transforms.resize(transforms.to_image(i), side), [side, side]) for i in row]
        tiles += [square.float() / 255 for square in squares] + [blank] * (columns - len(row))
    sheet = make_grid(torch.stack(tiles), nrow=columns, padding=4, pad_value=1.0)
    transforms.to_pil_image(sheet).save(path)
