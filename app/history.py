"""Images kept under the outputs folder, as PNGs that carry their settings; browsable after a restart."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from datetime import datetime
from pathlib import Path

from PIL import Image, PngImagePlugin

from .engine import Settings
from .library import base_name
from .limits import RequestError

LATEST = 60
MARK = ".favourite"


def user_folder(folder: Path, user: str | None) -> Path:
    """A folder of a user's own; without a login, everyone shares one."""
    return folder / (folder_name(user, user) if user else "everyone")


def base_folder(folder: Path, base: str) -> Path:
    """A folder of a base's own images."""
    return folder / folder_name(base_name(base), base)


def folder_name(words: str, whole: str) -> str:
    """A name that any file system takes: letters to read, and a hash that tells apart what they do not."""
    digest = hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()  # the same in every locale
    return f"{re.sub('[^A-Za-z0-9]', '-', words)[:40]}-{digest[:8]}"


class History:
    """Saves and lists images, by user; an image is addressed by its file's stem, looked up in the listing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, image: Image.Image, user: str | None) -> str:
        """Write an image with its settings beside its place, then rename; returns its id."""
        now = datetime.now()
        folder = user_folder(self.folder, user) / now.strftime("%Y-%m-%d")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{now:%H%M%S%f}-{secrets.token_hex(4)}"
        text = PngImagePlugin.PngInfo()
        for key, value in image.info.items():
            text.add_text(key, value)
        temporary = folder / f".{name}.tmp"
        image.save(temporary, "PNG", pnginfo=text)
        os.replace(temporary, folder / f"{name}.png")
        return name

    def latest(self, user: str | None, count: int = LATEST, *, favourites: bool = False) -> list[Path]:
        """A user's latest images, the newest first."""
        found = sorted(user_folder(self.folder, user).glob("*/[!.]*.png"), reverse=True)
        return [path for path in found if not favourites or self.is_favourite(path)][:count]

    def find(self, user: str | None, name: str) -> Path:
        """Where one of a user's images is; raises RequestError for an id that is none."""
        for path in self.latest(user, count=1_000_000):
            if path.stem == name:
                return path
        raise RequestError("There is no such image in the history.")

    def is_favourite(self, path: Path) -> bool:
        """Whether an image was marked, by an empty file beside it."""
        return path.with_suffix(MARK).exists()

    def favour(self, user: str | None, name: str) -> bool:
        """Mark one of a user's images, or take the mark away; whether it has one now."""
        mark = self.find(user, name).with_suffix(MARK)
        if mark.exists():
            mark.unlink()
            return False
        mark.touch()
        return True

    def delete(self, user: str | None, name: str) -> None:
        """Remove one of a user's images; raises RequestError for an id that is none."""
        path = self.find(user, name)
        path.with_suffix(MARK).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @staticmethod
    def made_at(path: Path) -> datetime:
        """When an image was made, by its file's name."""
        return datetime.strptime(f"{path.parent.name} {path.stem.split('-')[0][:6]}", "%Y-%m-%d %H%M%S")


def load_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def read_settings(path: Path) -> Settings:
    """The settings that a PNG was made with, without its pixels; raises RequestError if it carries none."""
    with Image.open(path) as image:
        return settings_of(image)


def settings_of(image: Image.Image) -> Settings:
    """The settings an image was made with; raises RequestError if it carries none."""
    text = image.info.get("s2ft")
    if not isinstance(text, str):
        raise RequestError("This image carries no settings.")
    return Settings.from_json(text)
