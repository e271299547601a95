"""Captions of toybox scenes, and the words the toybox's tokenizer is built from."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .objects import WEARABLES
from .world import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, Scene

UNSEEN_TOKEN = "sks"
ATTRIBUTES: dict[str, tuple[str, ...]] = {  # what captions can name, and its values
    "kind": CLASSES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": tuple(BACKGROUNDS),
    "wears": tuple(WEARABLES),
}

# Words people put into prompts, so that they are one token each; the base has learned to ignore them.
PROMPT_WORDS = """
a an the of in on at with and or is are to from by for near next its it this that one two three some
photo picture image drawing painting illustration render close up closeup bright dark good bad small big large tiny
cropped cool clean dirty nice weird rendition depiction view side front back top bottom left right behind above under
over inside outside standing sitting wearing holding riding playing sleeping running flying looking
old new young cute happy sad shiny wooden plastic metal glass toy stuffed animal person man woman child
can candle clock boot sneaker sunglasses glasses cartoon bowl duck monster plushie bear sloth berry
jungle mountain tree grass sand water sky road street table rug carpet floor wheat field blue house background
eiffel tower mirror cobblestone dirt leaves cube shaped fancy scarf santa wizard chef police firefighter outfit yellow
style art watercolor sketch pencil oil anime comic pixel high low quality detailed sharp blurry soft light sun moon
night day morning evening winter summer spring autumn rain cloud river lake ocean island park garden room wall window
""".split()


@dataclass(frozen=True)
class Mention:
    """A caption and the attributes of its scene that it names (None: not named)."""

    text: str
    kind: str | None = None
    colour: str | None = None
    pattern: str | None = None
    background: str | None = None
    wears: str | None = None


def describe(scene: Scene) -> str:
    """The full caption of a scene."""
    return _write(scene, colour=True, pattern=True, background=True, wears=True).text


def random_caption(scene: Scene, rng: random.Random, filler: list[str] | None = None) -> Mention:
    """A caption that mentions a random part of what the scene shows.

    With `filler`, one caption in five has one or two of these words before the noun: words without meaning in this
    world, so that a base trained on such captions takes unknown words calmly.
    """
    if rng.random() < 0.05:
        return Mention(text="")
    words = []
    if filler and rng.random() < 0.2:
        words = rng.choices(filler, k=rng.randint(1, 2))
    return _write(
        scene,
        colour=rng.random() < 0.8,
        pattern=rng.random() < 0.8,
        background=rng.random() < 0.8,
        wears=rng.random() < 0.9,
        filler=words,
        opening=rng.choice(("a photo of a", "a picture of a", "a", "the", "a photo of the", "photo of", "a photo of")),
    )


def _write(
    scene: Scene,
    *,
    colour: bool,
    pattern: bool,
    background: bool,
    wears: bool,
    filler: list[str] | tuple[str, ...] = (),
    opening: str = "a photo of a",
) -> Mention:
    named_pattern = scene.pattern if pattern and scene.pattern != "plain" else None
    words = [opening, *filler]
    if colour:
        words.append(scene.colour)
    if named_pattern:
        words.append(named_pattern)
    words.append(scene.kind)
    if wears and scene.wears:
        words.append(f"wearing a {scene.wears}")
    if background:
        words.append(BACKGROUNDS[scene.background])
    return Mention(
        text=" ".join(words),
        kind=scene.kind,
        colour=scene.colour if colour else None,
        pattern=named_pattern,
        background=scene.background if background else None,
        wears=scene.wears if wears else None,
    )


def world_words() -> list[str]:
    """Every word that captions of this world can contain, in a fixed order."""
    text = [*CLASSES, *COLOURS, *PATTERNS, *BACKGROUNDS.values(), *WEARABLES, "a photo picture of the wearing"]
    return list(dict.fromkeys(" ".join(text).split()))


def filler_words() -> list[str]:
    """Words of `PROMPT_WORDS` that mean nothing in this world."""
    known = set(world_words())
    return [word for word in dict.fromkeys(PROMPT_WORDS) if word not in known]
