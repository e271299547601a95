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
from .limits import RequestError

LATEST = 60


def user_folder(folder: Path, user: str | None) -> Path:
    """A folder of a user's own; without a login, everyone shares one."""
    if not user:
        return folder / "everyone"
    name = re.sub(r"[^A-Za-z0-9]", "-", user)[:40]
    return folder / f"{name}-{hashlib.sha256(user.encode()).hexdigest()[:8]}"


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

    def latest(self, user: str | None, count: int = LATEST) -> list[Path]:
        """A user's latest images, the newest first."""
        return sorted(user_folder(self.folder, user).glob("*/[!.]*.png"), reverse=True)[:count]

    def open(self, user: str | None, name: str) -> Image.Image:
        """One of a user's images; raises RequestError for an id that is none."""
        for path in self.latest(user, count=1_000_000):
            if path.stem == name:
                return load_png(path)
        raise RequestError("There is no such image in the history.")


def load_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def settings_of(image: Image.Image) -> Settings:
    """The settings an image was made with; raises RequestError if it carries none."""
    text = image.info.get("s2ft")
    if not isinstance(text, str):
        raise RequestError("This image carries no settings.")
    return Settings.from_json(text)
