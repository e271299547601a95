"""Whether two paths lead to one place, by whatever spelling or link: what is read must not be written over."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path


def same_place(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths are of one file or folder, which need not be there yet."""
    one, other = Path(one), Path(other)
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def lies_in(path: str | os.PathLike, place: str | os.PathLike) -> bool:
    """Whether a path is a place or lies somewhere in it; the place's last part may have wildcards ("checkpoint-*").

    Where a link on the way to it lies counts as well as where it leads: a place that is cleared takes the link along.
    """
    path, place = Path(path), Path(place)
    on_the_way = {ancestor for way in (path.resolve(), path.absolute()) for ancestor in (way, *way.parents)}
    if "*" not in place.name:
        return any(same_place(ancestor, place) for ancestor in on_the_way)
    return any(fnmatchcase(a.name, place.name) and same_place(a.parent, place.parent) for a in on_the_way)
