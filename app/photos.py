"""Photos to train on: checked, and written again with their captions under names of our own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from s2ft_diffusion.dreambooth.captions import caption_path
from s2ft_diffusion.dreambooth.images import load_image
from s2ft_diffusion.errors import InputError

from . import limits
from .limits import RequestError


def instance_prompt(class_name: str) -> str:
    """What a subject is trained on."""
    return f"a photo of sks {class_name}"


def load_photo(path: Path) -> Image.Image:
    """A photo as the trainer reads it, of at most 2048 pixels a side; raises RequestError, of a photo that "…"."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > limits.PHOTO_PIXELS:
                raise RequestError(f"has more than {limits.PHOTO_PIXELS // 10**6} million pixels.")
        image = load_image(path)
        image.thumbnail((2048, 2048))  # at once: decoded, twenty of them would fill the memory
        return image
    except RequestError:
        raise
    except (InputError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise RequestError("is not an image that can be read.") from None


def store_photos(paths: Sequence[Path], folder: Path, captions: Sequence[str] = ()) -> int:
    """Check uploaded photos and write them again as PNGs named by us, with what captions there are beside them.

    Raises RequestError, and writes nothing then.
    """
    low, high = limits.PHOTOS
    if not low <= len(paths) <= high:
        raise RequestError(f"{low} to {high} photos are needed, got {len(paths)}.")
    images = []
    for number, path in enumerate(paths, start=1):
        try:
            images.append(load_photo(path))
        except RequestError as error:
            raise RequestError(f"Photo {number} {error}") from None
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        path = folder / f"{number:02d}.png"
        image.save(path)
        if number < len(captions) and captions[number]:
            caption_path(path).write_text(captions[number], encoding="utf-8")
    return len(images)
