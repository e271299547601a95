"""What a request may ask for. Everything that comes from a client is checked here before work starts."""

from __future__ import annotations

import math
import secrets
import unicodedata
from typing import Any

PROMPT_LENGTH = 1000
STEPS = (1, 100)
GUIDANCE = (0.0, 30.0)
IMAGES = (1, 8)
STRENGTH = (0.0, 1.5)
SEEDS = 2**32
LINES = 12  # prompts in one request
SHEET = 96  # images in one comparison
PHOTOS = (3, 20)
PHOTO_PIXELS = 50_000_000
TRAIN_STEPS = (10, 5000)
TRAIN_NUMBERS = (100, 100_000)
WORDS_LENGTH = 60
CAPTION_LENGTH = 200
USER_TRAININGS = 3  # unfinished, of one user
TRAININGS = 20  # unfinished, of all


class RequestError(ValueError):
    """A request that cannot be met; its message is for the person who made it."""


def text(name: str, value: Any, limit: int, *, required: bool = False) -> str:
    """A string of at most `limit` characters, without control characters; letters in their composed form (NFC)."""
    value = "" if value is None else value
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text.")
    if len(value) > limit:
        raise RequestError(f"{name} has {len(value):,} characters; at most {limit:,} are taken.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} has characters in it that are none.") from None
    value = unicodedata.normalize("NFC", value)
    if any(ord(c) < 32 and c not in "\n\t" for c in value):
        raise RequestError(f"{name} has control characters in it.")
    if required and not value.strip():
        raise RequestError(f"{name} must not be empty.")
    return value.strip()


def lines(name: str, value: str) -> list[str]:
    """The lines of a text that are not empty."""
    found = [line.strip() for line in value.splitlines() if line.strip()]
    if not 1 <= len(found) <= LINES:
        raise RequestError(f"1 to {LINES} {name} are taken, one a line; got {len(found)}.")
    return found


def number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    """A finite number within bounds."""
    low, high = bounds
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number.")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low:,.12g} to {high:,.12g}, got {value:,.12g}.")
    return float(value)


def seed(value: Any) -> int:
    """A seed; -1 (or nothing) is a random one."""
    if value is None or value == -1:
        return secrets.randbelow(SEEDS)
    return whole("The seed", value, (0, SEEDS - 1))


def whole(name: str, value: Any, bounds: tuple[int, int]) -> int:
    """A whole number within bounds."""
    found = number(name, value, bounds)
    if found != int(found):
        raise RequestError(f"{name} must be a whole number, got {value!r}.")
    return int(found)
