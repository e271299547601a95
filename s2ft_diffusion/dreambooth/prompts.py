"""Prompts to what the denoiser is told: computed once while the text encoders are frozen, live while they train."""

from __future__ import annotations

import logging
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers

from .. import toybox
from ..errors import InputError
from ..families import Conditions, Family
from .base import base_options, find_family
from .settings import BaseSettings, Settings

logger = logging.getLogger("train_dreambooth_s2ft")


def check_prompts(settings: Settings, captions: Sequence[str] = ()) -> None:
    """Raise InputError for words whose subject the base's text encoders would not read; warn of other lost ones.

    Prompts and captions are looked at, by tokenizers and configs alone. Raised also for more tokens than a text encoder
    has places for.
    """
    windows, subject = read_windows(settings.base), words(settings.photos.prompt) - COMMON_WORDS
    asked = {"--instance_prompt": settings.photos.prompt}
    asked |= {f"The caption {caption!r}": caption for caption in captions if caption != settings.photos.prompt}
    for flag, others in (("--class_prompt", settings.classes), ("--validation_prompt", settings.validation)):
        asked |= {flag: others.prompt} if others else {}
    for what, prompt in asked.items():
        check_read(what, prompt, subject, windows)


def check_read(what: str, prompt: str, subject: Collection[str], windows: list[tuple[Any, int]]) -> None:
    """Raise InputError where words of the subject are only in a prompt's end, which no text encoder reads.

    Warns of other words that are lost. `what` is what a message calls the prompt.
    """
    lost = lost_words(prompt, windows)
    if not lost:
        return
    said = f"{what} is too long for the base: {lost!r} at its end would not be read."
    if loses_subject(prompt, subject, windows):
        raise InputError(f"{said} Shorten it, or put the subject first.")
    logger.warning("%s", said)


def loses_subject(prompt: str, subject: Collection[str], windows: list[tuple[Any, int]]) -> bool:
    """Whether a prompt has words of the subject that no text encoder reads, not even earlier in it."""
    if not lost_words(prompt, windows):
        return False
    read: set[str] = set()
    for tokenizer, window in windows:
        read |= words(prompt[: _read_to(prompt, tokenizer, window)])
    return not words(prompt).intersection(subject) <= read


def words(prompt: str) -> set[str]:
    """The words of a prompt, in lower case, and its symbols: an emoji names a subject as well as a word does."""
    symbols = {c for c in prompt if not c.isascii() and unicodedata.category(c).startswith("S")}
    return set(re.findall(r"\w+", prompt.lower())) | symbols


COMMON_WORDS = frozenset("a an and at by for from in of on the to with photo picture image".split())


def read_windows(settings: BaseSettings) -> list[tuple[Any, int]]:
    """A base's tokenizers, each with the tokens that are read of a prompt; raises InputError for more than fit."""
    family, index = find_family(settings)
    location = toybox.resolve(settings.name)
    options = {key: value for key, value in base_options(settings).items() if key == "revision"}
    windows = []
    for encoder in family.text_encoders:
        name = encoder.replace("text_encoder", "tokenizer")
        if not _present(index, name) or not _present(index, encoder):
            continue
        try:
            tokenizer = getattr(transformers, index[name][1]).from_pretrained(location, subfolder=name, **options)
            kind = getattr(transformers, index[encoder][1]).config_class
            config = kind.from_pretrained(location, subfolder=encoder, **options)
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"The {name} of the base {settings.name!r} cannot be read: {error}") from None
        places = getattr(config, "max_position_embeddings", None) if "CLIP" in index[encoder][1] else None
        if family.max_tokens is None and places and (settings.max_tokens or 0) > places:
            raise InputError(
                f"--tokenizer_max_length {settings.max_tokens} is more than the {places} tokens that the base's "
                f"{encoder} reads."
            )
        own = places or family.max_tokens or tokenizer.model_max_length
        windows.append((tokenizer, min(settings.max_tokens or own, own) if places else settings.max_tokens or own))
    return windows


def _present(index: Mapping[str, Any], name: str) -> bool:
    return (index.get(name) or [None])[0] is not None


def lost_words(prompt: str, windows: list[tuple[Any, int]]) -> str:
    """The end of a prompt that no text encoder reads: what the widest window cuts off."""
    ends = [prompt[_read_to(prompt, *window) :].strip() for window in windows]
    return min(ends, key=len, default="")


def _read_to(prompt: str, tokenizer: Any, window: int) -> int:
    """How many of a prompt's characters a text encoder reads, of whole words and symbols.

    By what fits into its window: what tokens decode to need not be what was written, and is nothing for an unknown one.
    """

    def tokens(characters: int) -> int:
        return len(tokenizer(prompt[:characters], verbose=False).input_ids)

    if tokens(len(prompt)) <= window:
        return len(prompt)
    ends = [0, *(found.end() for found in re.finditer(r"\w+|[^\w\s]", prompt))]
    return ends[bisect_right(ends, window, key=tokens) - 1]


class Prompts:
    """Calling it gives a prompt's conditions, as for a batch of one."""

    def __init__(self, family: Family, *, live: bool = False) -> None:
        self.family, self.live = family, live
        self._kept: dict[str, Conditions] = {}

    def __call__(self, prompt: str) -> Conditions:
        if self.live:
            return self.family.encode_prompt(prompt)
        if prompt not in self._kept:
            with torch.no_grad():
                self._kept[prompt] = self.family.encode_prompt(prompt)
        return self._kept[prompt]
