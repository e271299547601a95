"""Instance and class images: found, checked, and brought to square pixels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torchvision.transforms.v2 import functional as transforms

from ..errors import InputError
from ..text import printable
from . import captions

MAX_OBLONG = 10  # times as long as wide: its shorter side is brought to the resolution, and all of the longer one kept

logger = logging.getLogger(__name__)


def find_images(folder: str | Path) -> list[Path]:
    """The image files of a folder, sorted by name; hidden files and sub-folders are ignored, with a line saying so.

    A text file of an image's name is its caption, and none of them. Raises InputError for no folder, an empty folder,
    and a file that is no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{printable(folder)}: there is no such folder of images.")
    entries = sorted(folder.iterdir())
    ignored = [entry.name for entry in entries if entry.name.startswith(".") or entry.is_dir()]
    if ignored:
        logger.info("%s: ignoring hidden files and sub-folders: %s", printable(folder), printable(", ".join(ignored)))
    paths = [entry for entry in entries if entry.name not in ignored]
    named = {path.stem for path in paths if path.suffix != captions.SUFFIX}
    paths = [path for path in paths if path.suffix != captions.SUFFIX or path.stem not in named]
    if not paths:
        raise InputError(f"{printable(folder)}: there are no images in it.")
    return paths


def fingerprints(paths: Sequence[Path]) -> str:
    """The files' names and a hash of what each holds, as one line: the same line is the same photos and captions."""

    def content(path: Path) -> bytes:
        caption = captions.caption_path(path)
        return path.read_bytes() + (caption.read_bytes() if caption.is_file() else b"")

    return ", ".join(f"{printable(path.name)} {hashlib.sha256(content(path)).hexdigest()[:12]}" for path in paths)


def load_image(path: Path) -> Image.Image:
    """Any image file as RGB: turned as its EXIF says, more bits brought to 8, transparency on white.

    Raises InputError, naming the file, for one that is no image or is truncated, for gray values of no known scale (see
    `_eight_bits`), and for a picture more than `MAX_OBLONG` times as long as wide.
    """
    name = printable(path)
    try:
        with Image.open(path) as image:
            bits = getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
            image = ImageOps.exif_transpose(image)
            image.load()
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {error}") from None
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        kind = "a truncated image" if "truncated" in str(error).lower() else "not a readable image"
        raise InputError(f"{name}: {kind} ({printable(error)}).") from None
    if max(image.size) > MAX_OBLONG * min(image.size):
        raise InputError(f"{name}: {image.width}x{image.height} pixels are too oblong; crop the picture.")
    if image.mode.startswith("I") or image.mode == "F":
        whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (2**bits - 1,))
        image = Image.fromarray(_eight_bits(np.asarray(image).astype(np.float64), whites, name))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, whites: Sequence[int], name: str) -> np.ndarray:
    """Gray values of more than 8 bits as 0 to 255: white is the one of `whites` that they come near from below.

    16 bits have one white, 65535, as every viewer has it, or that of the bits a TIFF says it uses (4095 of 12). 32-bit
    integers say nothing and hold numbers of 8 or of 16 bits; floating-point ones go to 1 besides, and what is above it
    by up to as much again is a highlight, shown as white.

    Near is a sixteenth of white or more. With nothing so bright a picture is as good as black, or has a scale that it
    does not tell, as 12 bits of a camera in 16: InputError, which names the file, rather than training on black.
    """
    least, greatest = float(values.min()), float(values.max())
    highlights = {1: 2.0}
    white = next((w for w in whites if w / 16 <= greatest <= highlights.get(w, w)), None)
    if white is None or not least >= 0:
        raise InputError(
            f"{name}: its numbers go from {least:g} to {greatest:g}, which is no known scale; save it with 8 bits."
        )
    return (values * (255 / white)).clip(0, 255).round().astype(np.uint8)


class SquareImages:
    """Images resized so that the shorter side is `resolution`, held as bytes, cropped to squares on demand.

    With `center_crop`, or where all are square already, a picture's crop is always the same (`fixed`), so that what is
    computed from it can be kept.
    """

    def __init__(self, paths: list[Path], resolution: int, *, center_crop: bool) -> None:
        self.resolution = resolution
        self._pixels = [self._resized(load_image(path)) for path in paths]
        self.center_crop = center_crop
        self.fixed = center_crop or all(p.shape[-1] == p.shape[-2] for p in self._pixels)

    def __len__(self) -> int:
        return len(self._pixels)

    def _resized(self, image: Image.Image) -> torch.Tensor:
        image = transforms.resize(image, self.resolution, transforms.InterpolationMode.LANCZOS)
        return transforms.pil_to_tensor(image)

    def crop(self, index: int, place: tuple[float, float] = (0.5, 0.5), *, flip: bool = False) -> torch.Tensor:
        """One image as (3, resolution, resolution) in [-1, 1]; `place` (vertical, horizontal) in [0, 1) says which
        square of a longer image, and is ignored with `center_crop`."""
        pixels = self._pixels[index]
        vertical, horizontal = (0.5, 0.5) if self.center_crop else place
        top = int(vertical * (pixels.shape[-2] - self.resolution + 1))
        left = int(horizontal * (pixels.shape[-1] - self.resolution + 1))
        square = pixels[:, top : top + self.resolution, left : left + self.resolution]
        square = square.flip(-1) if flip else square
        return square.float() / 127.5 - 1.0
