"""Captions: a photo's own prompt in a text file of its name, `beach.txt` beside `beach.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..text import printable

SUFFIX = ".txt"


def caption_path(photo: Path) -> Path:
    """Where a photo's caption is, if it has one."""
    return photo.with_suffix(SUFFIX)


def read_captions(photos: Sequence[Path], prompt: str) -> list[str]:
    """The prompt that each photo is trained with: its caption, or `prompt` where it has none or an empty one.

    Raises InputError for a caption that is no UTF-8 text.
    """
    captions = []
    for photo in photos:
        path = caption_path(photo)
        try:
            words = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{printable(path)}: a caption that cannot be read as UTF-8 ({error}).") from None
        captions.append(" ".join(words.split()) or prompt)
    return captions
