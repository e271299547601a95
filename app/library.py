"""The adapters that can be chosen: found, read by their headers alone, and addressed by opaque ids.

A client names an adapter by its id; an id is looked up in what was found, and never becomes part of a path.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from s2ft_diffusion.adapters.file import AdapterFileError, AdapterInfo, read_adapter, read_header
from s2ft_diffusion.pipelines.attach import check_fits, check_shapes
from s2ft_diffusion.pipelines.sources import find_adapter_file

from .limits import PROMPT_LENGTH, RequestError
from .words import drawn, folded, shown

TILE = 192
MAX_FILES = 2000  # looked at in one folder
MAX_OWN = 500  # uploads and trainings together
HUB_ASKED_AGAIN = 600.0  # seconds after which an adapter that could not be fetched is asked for again
SORTS = ("newest", "name", "smallest", "fewest numbers")


@dataclass(frozen=True)
class Entry:
    """One adapter; `reason` says why it cannot be used, where it cannot."""

    id: str
    name: str
    path: Path
    bytes: int = 0
    modified: float = 0.0
    info: AdapterInfo = field(default_factory=AdapterInfo)
    trainable: int = 0
    reason: str | None = None

    @property
    def state(self) -> tuple[str, int, float]:
        """What changes when the file does."""
        return str(self.path), self.bytes, self.modified

    def picture(self) -> Image.Image:
        """The sample image from the header, or a drawn tile; greyed if the adapter cannot be used."""
        image = None
        if self.info.thumbnail:
            try:
                with Image.open(io.BytesIO(self.info.thumbnail)) as sample:
                    if max(sample.size) <= 1024:
                        image = ImageOps.fit(sample.convert("RGB"), (TILE, TILE))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                pass
        if image is None:
            image = Image.new("RGB", (TILE, TILE), _tint(self.id))
            font = ImageFont.load_default(TILE // 2)
            letter = (drawn(self.name[:1]) or drawn((self.info.class_name or "")[:1])).upper()
            ImageDraw.Draw(image).text((TILE / 2, TILE / 2), letter, "white", font, anchor="mm")
        if self.reason:
            grey = ImageOps.grayscale(image).convert("RGB")
            image = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.55)
        return image

    def summary(self) -> dict[str, object]:
        """What the header says, as plain values."""
        return {
            "id": self.id,
            "name": self.name,
            "subject": self.info.subject,
            "instance_prompt": self.info.instance_prompt,
            "base": self.info.base_model,
            "bytes": self.bytes,
            "trainable": self.trainable,
            "date": self.info.date,
            "usable": self.reason is None,
            "reason": self.reason,
        }


def _tint(key: str) -> tuple[int, int, int]:
    red, green, blue = hashlib.sha256(key.encode()).digest()[:3]
    return 70 + red // 3, 70 + green // 3, 90 + blue // 3


class Library:
    """The adapters under `sources` (folders, files, hub ids) and in `folder`, where uploads and trainings are put."""

    def __init__(self, sources: Sequence[str], folder: Path, components: Mapping[str, nn.Module]) -> None:
        self.sources, self.folder, self.components = list(sources), folder, components
        self._entries: dict[str, Entry] = {}
        self._on_hub: dict[str, tuple[Path | None, float]] = {}  # where a hub's file is, and when that was asked
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Look again; files that have not changed are not read again."""
        for source in self.sources:
            self._ask_hub(source)  # not under the lock: it may take long
        with self._lock:
            known = {entry.state: entry for entry in self._entries.values()}
            entries: dict[str, Entry] = {}
            for label, path, reason in self._files():
                entry = self._entry(label, path, reason, known)
                entries[entry.id] = entry
            self._entries = entries

    def _files(self) -> list[tuple[str, Path, str | None]]:
        """Label, path, and why there is none."""
        found: list[tuple[str, Path, str | None]] = []
        for source in [*self.sources, str(self.folder)]:
            path = Path(source)
            if path.is_dir():
                files = sorted(p for p in path.rglob("*.safetensors") if _visible(p.relative_to(path)) and p.is_file())
                found += [(p.stem if p.parent == path else p.parent.name, p, None) for p in files[:MAX_FILES]]
            elif path.is_file():
                found.append((path.stem, path, None))
            else:
                file, _ = self._on_hub.get(source, (None, 0.0))
                reason = None if file else "neither a file nor a folder here, nor a repository that can be reached"
                found.append((source, file or path, reason))
        return found

    def _ask_hub(self, source: str) -> None:
        """Fetch an adapter that is no file or folder here: once, and now and then again while that fails."""
        file, asked = self._on_hub.get(source, (None, -math.inf))
        if Path(source).exists() or file or time.monotonic() - asked < HUB_ASKED_AGAIN:
            return
        self._on_hub[source] = (None, time.monotonic())
        with suppress(AdapterFileError, OSError, HfHubHTTPError):
            self._on_hub[source] = (find_adapter_file(source), time.monotonic())

    def _entry(self, label: str, path: Path, reason: str | None, known: dict[tuple, Entry]) -> Entry:
        name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]
        label = shown(label)
        if reason:
            return Entry(name, label, path, reason=reason)
        try:
            stat = path.stat()
        except OSError:
            return Entry(name, label, path, reason="it cannot be read")
        entry = Entry(name, label, path, stat.st_size, stat.st_mtime)
        if entry.state in known:
            return known[entry.state]
        facts = {"id": name, "path": path, "bytes": stat.st_size, "modified": stat.st_mtime}
        try:
            header = read_header(path)
        except AdapterFileError as error:
            return Entry(**facts, name=label, reason=plain(str(error), path))
        try:
            check_shapes(header.shapes, self.components, path.name, header.info.base_model)
        except AdapterFileError as error:
            reason = plain(str(error), path)
        info = replace(
            header.info,
            subject=shown(header.info.subject),
            instance_prompt=shown(header.info.instance_prompt, PROMPT_LENGTH),
            class_name=shown(header.info.class_name),
            base_model=shown(header.info.base_model),
            date=shown(header.info.date),
        )
        return Entry(**facts, name=info.subject or label, info=info, trainable=header.trainable, reason=reason)

    # What clients may do

    def get(self, adapter_id: object) -> Entry:
        """The usable adapter of an id; raises RequestError for anything else."""
        entry = self._entries.get(adapter_id) if isinstance(adapter_id, str) else None
        if entry is None:
            raise RequestError("There is no such adapter; refresh the library.")
        if entry.reason:
            raise RequestError(f"{entry.name} cannot be used: {entry.reason}")
        return entry

    def search(self, words: str = "", sort: str = "newest") -> list[Entry]:
        """The adapters in whose header all the words occur, sorted; those that cannot be used come last."""
        keys = {
            "newest": lambda e: -e.modified,
            "name": lambda e: folded(e.name),
            "smallest": lambda e: e.bytes,
            "fewest numbers": lambda e: e.trainable,
        }
        if sort not in keys:
            raise RequestError(f"sort must be one of {', '.join(SORTS)}.")
        wanted = folded(words).split()

        def matches(entry: Entry) -> bool:
            text = folded(f"{entry.name} {entry.info.subject} {entry.info.instance_prompt} {entry.info.base_model}")
            return all(word in text for word in wanted)

        return sorted(filter(matches, self._entries.values()), key=lambda e: (e.reason is not None, keys[sort](e)))

    def choices(self) -> list[tuple[str, str]]:
        """Labels and ids of what can be used; labels that several share are told apart."""
        usable = [entry for entry in self.search(sort="name") if not entry.reason]
        names = [entry.name for entry in usable]
        return [(e.name if names.count(e.name) == 1 else f"{e.name} ({e.id[:4]})", e.id) for e in usable]

    def check_room(self) -> None:
        """Raise RequestError where there are too many adapters already."""
        if len(list(self.folder.glob("*.safetensors"))) >= MAX_OWN:
            raise RequestError("The library is full; ask whoever runs this app to make room.")

    def add(self, path: Path) -> Entry:
        """Copy a file in under a name of our own, if it passes the strict reader and fits the base.

        Raises RequestError otherwise, and where there are too many already; keeps nothing then.
        """
        self.check_room()
        try:
            check_fits(read_adapter(path), self.components, "the file")
        except AdapterFileError as error:
            raise RequestError(f"This file cannot be used: {plain(str(error), path)}") from None
        final = self.folder / f"{secrets.token_hex(8)}.safetensors"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            shutil.copyfile(path, temporary)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        self.refresh()
        return next(entry for entry in self._entries.values() if entry.path == final)


def _visible(relative: Path) -> bool:
    """Not hidden, and no checkpoint of a training run."""
    return not any(part.startswith((".", "checkpoint-")) for part in relative.parts)


def plain(message: str, *paths: Path) -> str:
    """A message for strangers: without the given paths, and without anything else that looks like one."""
    for path in paths:
        for spelling in (str(path.absolute()), str(path)):
            message = message.replace(f"{spelling}: ", "").replace(spelling, path.name)
    return re.sub(r"(?<![\w.])/[\w./-]+/([\w.-]+)", r"\1", message)
