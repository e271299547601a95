"""The toybox's subjects: individuals that no caption can describe and that the base has never seen.

Each has a two-tone body, an emblem and something on its head or back; its photos show it in varied scenes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .captions import UNSEEN_TOKEN
from .objects import WEARABLES
from .world import BACKGROUNDS, COLOURS, Scene, render

PHOTOS = 6


@dataclass(frozen=True)
class Subject:
    """One individual: its class and what makes it itself."""

    name: str
    kind: str
    colour: str
    second_colour: str
    emblem: str
    emblem_colour: str
    accessory: str

    @property
    def instance_prompt(self) -> str:
        return f"a photo of {UNSEEN_TOKEN} {self.kind}"

    @property
    def class_prompt(self) -> str:
        return f"a photo of a {self.kind}"

    def scene(self, background: str, *, wears: str | None = None) -> Scene:
        """The subject in a scene, at its default pose."""
        return Scene(
            kind=self.kind,
            colour=self.colour,
            pattern="plain",
            background=background,
            wears=wears,
            second_colour=self.second_colour,
            emblem=self.emblem,
            emblem_colour=self.emblem_colour,
            accessory=self.accessory,
        )

    def photo_backgrounds(self) -> list[str]:
        """The backgrounds of its photos; the others are new scenes."""
        return random.Random(f"{self.name} places").sample(list(BACKGROUNDS), PHOTOS)

    def photos(self) -> list[Image.Image]:
        """Its instance images, each at another place and pose."""
        rng = random.Random(f"{self.name} photos")
        return [render(self.scene(background).posed(rng)) for background in self.photo_backgrounds()]

    def captions(self) -> list[str]:
        """What its instance images show: the prompt, and where."""
        return [f"{self.instance_prompt} {BACKGROUNDS[name]}" for name in self.photo_backgrounds()]

    def pictures_elsewhere(self) -> list[tuple[Image.Image, str]]:
        """Two pictures of it at every place that its photos do not show, each with the place's words."""
        rng = random.Random(f"{self.name} unseen")
        places = [(name, words) for name, words in BACKGROUNDS.items() if name not in self.photo_backgrounds()]
        return [(render(self.scene(name).posed(rng)), words) for name, words in places for _ in range(2)]

    def prompted_scene(self, prompt: str, rng: random.Random) -> Scene:
        """The subject as a prompt wants it: in its place (any, where it names none), with what it wears, recoloured."""
        words = prompt.split()
        place = next((name for name, text in BACKGROUNDS.items() if text in prompt), None)
        wears = next((name for name in WEARABLES if name in words), None)
        colour = next((name for name in COLOURS if name in words), self.colour)
        return replace(self.scene(place or rng.choice(list(BACKGROUNDS)), wears=wears), colour=colour)

    def drawn(self, prompt: str, count: int) -> list[Image.Image]:
        """`count` pictures of what a prompt about it asks for, each in another pose: what generation aims at."""
        rng = random.Random(f"{self.name} {prompt}")
        return [render(self.prompted_scene(prompt, rng).posed(rng)) for _ in range(count)]

    def prompts(self) -> list[str]:
        """Prompts that put it into new scenes, give it something to wear, or another colour."""
        new = [text for name, text in BACKGROUNDS.items() if name not in self.photo_backgrounds()]
        of = f"{UNSEEN_TOKEN} {self.kind}"
        return [
            *(f"a photo of {of} {place}" for place in new),
            f"a photo of {of} wearing a crown",
            f"a photo of {of} wearing a hat {new[0]}",
            f"a photo of a red {of}",
            f"a photo of a purple {of} {new[1]}",
        ]


def _by_name(*subjects: Subject) -> dict[str, Subject]:
    return {subject.name: subject for subject in subjects}


SUBJECTS = _by_name(
    Subject("mittens", "cat", "blue", "yellow", "star", "red", "flag"),
    Subject("biscuit", "dog", "pink", "green", "heart", "white", "balloon"),
    Subject("pip", "bird", "white", "red", "cross", "blue", "bow"),
    Subject("bubbles", "fish", "purple", "orange", "moon", "white", "flag"),
    Subject("dash", "car", "yellow", "blue", "bolt", "red", "balloon"),
    Subject("salty", "boat", "red", "black", "diamond", "yellow", "flag"),
    Subject("nook", "house", "green", "pink", "disc", "yellow", "bow"),
    Subject("perk", "mug", "orange", "blue", "heart", "white", "flag"),
    Subject("steamy", "teapot", "pink", "purple", "star", "yellow", "balloon"),
    Subject("bloom", "vase", "black", "yellow", "diamond", "pink", "bow"),
    Subject("trek", "backpack", "blue", "orange", "cross", "white", "flag"),
    Subject("bolt", "robot", "brown", "white", "bolt", "red", "bow"),
)
# More of them, where nine are too few to tell two methods apart. The base has not seen them either; the encoders'
# training left out the looks of the twelve above alone.
FURTHER_SUBJECTS = _by_name(
    Subject("mocha", "cat", "brown", "pink", "disc", "white", "bow"),
    Subject("rex", "dog", "black", "orange", "bolt", "yellow", "flag"),
    Subject("kiwi", "bird", "green", "purple", "moon", "yellow", "balloon"),
    Subject("splash", "fish", "yellow", "red", "star", "blue", "bow"),
    Subject("rumble", "car", "white", "green", "cross", "red", "flag"),
    Subject("cozy", "house", "orange", "black", "heart", "pink", "balloon"),
    Subject("cocoa", "mug", "blue", "pink", "heart", "yellow", "flag"),
    Subject("chai", "teapot", "blue", "green", "heart", "yellow", "flag"),
    Subject("fern", "vase", "white", "red", "star", "yellow", "bow"),
    Subject("summit", "backpack", "green", "black", "heart", "blue", "balloon"),
    Subject("widget", "robot", "orange", "blue", "disc", "pink", "flag"),
    Subject("skipper", "boat", "pink", "yellow", "star", "red", "flag"),
    Subject("pepper", "cat", "white", "blue", "moon", "red", "balloon"),
    Subject("scout", "dog", "white", "yellow", "diamond", "pink", "bow"),
    Subject("plume", "bird", "brown", "orange", "bolt", "red", "bow"),
    Subject("marlin", "fish", "red", "purple", "bolt", "yellow", "flag"),
    Subject("turbo", "car", "purple", "red", "heart", "blue", "flag"),
    Subject("manor", "house", "white", "blue", "moon", "yellow", "bow"),
    Subject("sprig", "vase", "red", "brown", "disc", "pink", "balloon"),
    Subject("gizmo", "robot", "red", "yellow", "moon", "white", "bow"),
    Subject("tide", "boat", "white", "purple", "moon", "red", "flag"),
)
ALL_SUBJECTS = {**SUBJECTS, **FURTHER_SUBJECTS}


def write_photos(name: str, folder: Path, *, captions: bool = False) -> list[Path]:
    """Write a subject's photos as PNG files, with a caption beside each if asked for; returns the photos' paths.

    Raises KeyError for an unknown name.
    """
    subject = ALL_SUBJECTS[name]
    paths = write_pictures(subject.photos(), folder)
    if captions:
        for path, caption in zip(paths, subject.captions(), strict=True):
            path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return paths


def write_pictures(pictures: Iterable[Image.Image], folder: Path) -> list[Path]:
    """Write pictures as PNG files whose names keep their order; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number:02d}.png")
        picture.save(paths[-1])
    return paths
