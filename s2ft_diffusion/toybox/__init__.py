"""The embedded world: a renderer, subjects, and two small bases trained on it over one autoencoder.

`DiffusionPipeline.from_pretrained(s2ft_diffusion.toybox.base_path())` loads the U-Net base, a Stable Diffusion;
`base_path("flow")` is the flow base, a Stable Diffusion 3. Where a base is named by a word, `resolve` finds it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_FOLDERS = {"unet": "base", "flow": "flow"}
_NAMES: dict[str, Literal["unet", "flow"]] = {"toybox": "unet", "toybox-flow": "flow"}
NAMES = tuple(_NAMES)


def base_path(kind: Literal["unet", "flow"] = "unet") -> Path:
    """The folder of an embedded base, complete, in diffusers' standard layout."""
    if kind not in _FOLDERS:
        raise ValueError(f"There is no embedded base {kind!r}; it is one of {', '.join(map(repr, _FOLDERS))}.")
    return Path(__file__).parent / _FOLDERS[kind]


def is_embedded(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is one of `NAMES`."""
    return os.fspath(name) in _NAMES


def resolve(name: str | os.PathLike[str]) -> str:
    """Where the base called `name` is: an embedded base's folder for one of `NAMES`, else `name` itself.

    Everything that takes the name of a base asks this function, so that hub ids, folders and embedded bases are
    taken everywhere alike.
    """
    name = os.fspath(name)
    return str(base_path(_NAMES[name])) if name in _NAMES else name
