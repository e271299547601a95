"""A run's folders must be apart: what one run writes would be the next one's photos, or take their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapters.places import lies_in, same_place
from ..errors import InputError
from ..text import printable


def check_apart(read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Raise InputError where a folder of images that is read is one that is written to, by whatever path.

    The mappings are folders by what a message calls them; None is no folder. One inside another is fine: sub-folders of
    what is read are ignored there.
    """
    for name, source in read.items():
        for other, target in written.items():
            if source is not None and target is not None and name != other and same_place(source, target):
                raise InputError(f"{other} and {name} are one folder, {printable(target.resolve())}; choose another.")


def check_outside(paths: Mapping[str, Path | None], places: Mapping[str, Path | None]) -> None:
    """Raise InputError where a path is one of the places, or lies in one: by whatever path, at whatever depth.

    For places that are read or cleared whole, sub-folders and all. A place's last part may have wildcards.
    """
    for name, path in paths.items():
        for other, place in places.items():
            if path is not None and place is not None and lies_in(path, place):
                raise InputError(f"{name} lies in {other}, {printable(place.resolve())}; choose another.")
