"""Words that strangers wrote - adapters' headers, names of subjects - made fit to be shown."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from PIL import ImageFont

NAME_LENGTH = 80


def shown(text: str | None, limit: int = NAME_LENGTH) -> str | None:
    """One line of at most `limit` characters that any page can carry: no control characters, no half surrogates."""
    if text is None:
        return None
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def folded(text: str) -> str:
    """Text to search in and for: equal for all spellings of the same letters."""
    return unicodedata.normalize("NFC", text).casefold()


def escaped(text: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~&$])", r"\\\1", str(text))


def drawn(text: str) -> str:
    """Text in letters that the font of pictures has, accents left out; "" where it has none for some of it."""
    text = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    return text if all(_glyph(letter) != _glyph("\uffff") for letter in text if not letter.isspace()) else ""


@cache
def _glyph(letter: str) -> bytes:
    mask = ImageFont.load_default(32).getmask(letter)
    return repr(mask.size).encode() + bytes(mask)
