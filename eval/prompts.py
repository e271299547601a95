"""Prompts for a subject: DreamBench's file as it is distributed, a plain list, or the embedded world's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from s2ft_diffusion.dreambooth.prompts import check_read, read_windows, words
from s2ft_diffusion.dreambooth.settings import BaseSettings
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.toybox.world import BACKGROUNDS, CLASSES

LIVE_CLASSES = ("cat", "dog")
TOKEN, CLASS = "{0}", "{1}"


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is generated from, and without the unique token as CLIP reads it."""

    text: str
    plain: str

    @classmethod
    def fill(cls, template: str, token: str, class_name: str) -> Prompt:
        """A template with `{0}` for the unique token and `{1}` for the class; without them, taken as it is."""
        text, plain = (
            " ".join(template.replace(TOKEN, word).replace(CLASS, class_name).split()) for word in (token, "")
        )
        without = " ".join(word for word in plain.split() if word != token)
        return cls(text, without)


def read_classes(path: Path) -> dict[str, str]:
    """The classes of subjects by name, from DreamBench's `prompts_and_classes.txt`. Raises InputError without any."""
    try:
        table = path.read_text(encoding="utf-8-sig").partition("Prompts")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of subjects ({error}).") from None
    rows = re.findall(r"^([^,\n]+),([^,\n]+)$", table.partition("subject_name,class")[2], re.MULTILINE)
    if not rows:
        raise InputError(f'{path}: has no lines such as "dog,dog" under "subject_name,class".')
    return {name.strip(): kind.strip() for name, kind in rows}


def read_templates(path: Path, class_name: str) -> list[str]:
    """Templates of a file: one a line ("#" begins a comment), or DreamBench's `prompts_and_classes.txt`, of which an
    animal takes the live-subject prompts and all else the object prompts.

    Raises InputError for a file that has none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of prompts ({error}).") from None
    if re.search(r"^\s*prompt_list\s*=\s*\[", text, re.MULTILINE):
        lists = {}
        for title, body in re.findall(r"^(\w[\w ]*?) Prompts\s*\n+\s*prompt_list\s*=\s*\[(.*?)^\]", text, re.M | re.S):
            lists[title.lower()] = re.findall(r"'([^']*)'\.format", body)
        wanted = "live subject" if class_name in LIVE_CLASSES else "object"
        if not lists.get(wanted):
            raise InputError(f"{path}: has no {wanted!r} prompts, but {sorted(lists)}.")
        return lists[wanted]
    found = [line.strip() for line in text.splitlines()]
    found = [line for line in found if line and not line.startswith("#")]
    if not found:
        raise InputError(f"{path}: there are no prompts in it.")
    return found


def toybox_templates() -> list[str]:
    """The subject in every place of the embedded world, and dressed or coloured otherwise."""
    places = list(BACKGROUNDS.values())
    of = f"{TOKEN} {CLASS}"
    return [
        *(f"a photo of {of} {place}" for place in places),
        f"a photo of {of} wearing a crown",
        f"a photo of {of} wearing a hat {places[0]}",
        f"a photo of a red {of}",
        f"a photo of a purple {of} {places[1]}",
    ]


def drift_prompts(class_name: str) -> list[str]:
    """Prompts that do not name the subject: its class, and other things."""
    others = [name for name in CLASSES if name != class_name][:3]
    return [
        f"a photo of a {name} {place}" for name in (class_name, *others) for place in list(BACKGROUNDS.values())[:2]
    ]


def check_all_read(base: str, prompts: Iterable[str], subject: str) -> None:
    """Raise InputError for a prompt at whose end words of the subject would not be read by the base's text encoders.

    `subject` is the unique token and the class; other words that are lost are warned of.
    """
    windows = read_windows(BaseSettings(base))
    for prompt in dict.fromkeys(prompts):
        check_read(f"The prompt {prompt!r}", prompt, words(subject), windows)
