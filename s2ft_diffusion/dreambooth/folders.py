"""A run's folders must be apart: what one run writes would be the next one's photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import InputError
from .text import printable


def check_apart(read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Raise InputError where a folder of images that is read is one that is written to, by whatever path.

    The mappings are folders by what a message calls them; None is no folder. One inside another is fine: sub-folders of
    what is read are ignored there.
    """
    for name, source in read.items():
        for other, target in written.items():
            if source is not None and target is not None and name != other and _same(source, target):
                raise InputError(f"{other} and {name} are one folder, {printable(target.resolve())}; choose another.")


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()
