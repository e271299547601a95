"""The adapters that can be chosen: found, read by their headers alone, and addressed by opaque ids.

A client names an adapter by its id; an id is looked up in what was found, and never becomes part of a path.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from s2ft_diffusion.adapters.file import AdapterFileError, AdapterInfo, read_adapter, read_header
from s2ft_diffusion.adapters.reading import METADATA_KEY
from s2ft_diffusion.pipelines.attach import check_fits, check_shapes
from s2ft_diffusion.pipelines.sources import find_adapter_file
from s2ft_diffusion.text import printable

from .limits import PROMPT_LENGTH, RequestError, text
from .words import NAME_LENGTH, drawn, folded, shown

TILE = 192
MAX_FILES = 2000  # looked at in one folder
MAX_OWN = 500  # uploads and trainings together
HUB_ASKED_AGAIN = 600.0  # seconds after which an adapter that could not be fetched is asked for again
SORTS = ("newest", "name", "smallest", "fewest numbers")


@dataclass(frozen=True)
class Entry:
    """One adapter; `reason` says why it cannot be used, where it cannot, `warning` what is odd about it.

    `foreign`: it was made for another base, and does not fit this one.
    """

    id: str
    name: str
    path: Path
    bytes: int = 0
    modified: float = 0.0
    info: AdapterInfo = field(default_factory=AdapterInfo, hash=False)
    trainable: int = 0
    reason: str | None = None
    warning: str | None = None
    foreign: bool = False

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
            "warning": self.warning,
        }


def _tint(key: str) -> tuple[int, int, int]:
    red, green, blue = hashlib.sha256(key.encode()).digest()[:3]
    return 70 + red // 3, 70 + green // 3, 90 + blue // 3


class Library:
    """The adapters under `sources` (folders, files, hub ids) and in `folder`, where uploads and trainings are put."""

    def __init__(
        self, sources: Sequence[str], folder: Path, components: Mapping[str, nn.Module], base: str | None = None
    ) -> None:
        """`base`: what an adapter's header calls the base that `components` are of, to notice another one's."""
        self.sources, self.folder, self.components, self.base = list(sources), folder, components, base
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
        label = shown(printable(label))
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
        except AdapterFileError:
            reason = self._does_not_fit(header.info)
        info = replace(
            header.info,
            subject=shown(header.info.subject),
            instance_prompt=shown(header.info.instance_prompt, PROMPT_LENGTH),
            class_name=shown(header.info.class_name),
            base_model=shown(header.info.base_model),
            date=shown(header.info.date),
        )
        warning = None if reason else self._other_base(info)
        name = info.subject or label
        foreign = reason is not None and self._is_other(info)
        return Entry(
            **facts, name=name, info=info, trainable=header.trainable, reason=reason, warning=warning, foreign=foreign
        )

    def _does_not_fit(self, info: AdapterInfo) -> str:
        """Why an adapter with other layers than the base has cannot be used."""
        made_for = base_name(shown(info.base_model)) or "another model"
        if self.base and made_for == base_name(self.base):
            return f"it does not fit {made_for}, although it says that it was made for it"
        return f"it was made for {made_for} and does not fit {base_name(self.base) or 'this one'}"

    def _is_other(self, info: AdapterInfo) -> bool:
        """Whether an adapter says that it was made for another base."""
        return bool(self.base and info.base_model) and base_name(info.base_model) != base_name(self.base)

    def _other_base(self, info: AdapterInfo) -> str | None:
        """What to say of an adapter that fits, but was trained on another base."""
        if not self._is_other(info):
            return None
        return f"made for {base_name(info.base_model)}: it fits, but may not show its subject here"

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
        if sort not in SORTS:  # a tuple: what was sent may be of any type
            raise RequestError(f"sort must be one of {', '.join(SORTS)}.")
        wanted = folded(words).split()

        def matches(entry: Entry) -> bool:
            said = folded(f"{entry.name} {entry.info.subject} {entry.info.instance_prompt} {entry.info.base_model}")
            return all(word in said for word in wanted)

        return sorted(filter(matches, self._entries.values()), key=lambda e: (e.reason is not None, keys[sort](e)))

    def choices(self) -> list[tuple[str, str]]:
        """Labels and ids of what can be used; labels that several share are told apart."""
        labels = self.labels()
        return [(labels[entry.id], entry.id) for entry in self.search(sort="name") if not entry.reason]

    def labels(self) -> dict[str, str]:
        """What to call each adapter, by id: its name; where several share one, with their dates, else their files."""
        alike: dict[str, list[Entry]] = {}
        for entry in list(self._entries.values()):
            alike.setdefault(entry.name, []).append(entry)
        found: dict[str, str] = {}
        for name, entries in alike.items():
            for tell in (lambda e: "", lambda e: e.info.date, lambda e: e.path.stem, lambda e: e.id):
                marks = [tell(entry) for entry in entries]
                if len(set(marks)) == len(entries):
                    break
            for entry, mark in zip(entries, marks, strict=True):
                found[entry.id] = f"{name} ({mark})" if mark else name
        return found

    def own(self, entry: Entry) -> bool:
        """Whether it was uploaded or trained here, so that it may be renamed and deleted."""
        return entry.path.parent == self.folder

    def owned(self, adapter_id: object) -> Entry:
        """An adapter that may be renamed and deleted, usable or not; raises RequestError."""
        entry = self._entries.get(adapter_id) if isinstance(adapter_id, str) else None
        if entry is None:
            raise RequestError("There is no such adapter; refresh the library.")
        if not self.own(entry):
            raise RequestError(f"{entry.name} was not uploaded or trained here, so it stays as it is.")
        return entry

    def delete(self, adapter_id: object) -> None:
        """Remove an upload or a training's adapter; raises RequestError for any other."""
        self.owned(adapter_id).path.unlink(missing_ok=True)
        self.refresh()

    def rename(self, adapter_id: object, name: object) -> Entry:
        """Give an upload or a training's adapter another subject, in its file; raises RequestError."""
        entry = self.owned(adapter_id)
        name = text("The name", name, NAME_LENGTH, required=True)
        if entry.reason:
            raise RequestError(f"{entry.name} cannot be renamed: {entry.reason}")
        with safe_open(entry.path, "pt") as file:
            header = json.loads(file.metadata()[METADATA_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        header["info"]["subject"] = shown(name)
        temporary = entry.path.with_name(f".{entry.path.name}.tmp")
        try:
            save_file(tensors, temporary, {METADATA_KEY: json.dumps(header)})
            os.replace(temporary, entry.path)
        finally:
            temporary.unlink(missing_ok=True)
        self.refresh()
        return self._entries[entry.id]

    def same_file(self, path: Path) -> Entry | None:
        """The usable adapter whose file holds the same bytes, if there is one."""
        for entry in list(self._entries.values()):
            if not entry.reason and entry.bytes == path.stat().st_size:
                with suppress(OSError):
                    if filecmp.cmp(entry.path, path, shallow=False):
                        return entry
        return None

    def check_room(self) -> None:
        """Raise RequestError where there are too many adapters already."""
        if len(list(self.folder.glob("*.safetensors"))) >= MAX_OWN:
            raise RequestError("The library is full; ask whoever runs this app to make room.")

    def add(self, path: Path) -> Entry:
        """Copy a file in under a name of our own, if it passes the strict reader and fits the base.

        A file that is there already is not stored again. Raises RequestError otherwise, and where there are too many
        already; keeps nothing then.
        """
        if there := self.same_file(path):
            return there
        self.check_room()
        try:
            adapter = read_adapter(path)
        except AdapterFileError as error:
            raise RequestError(f"This file cannot be used: {plain(str(error), path)}") from None
        try:
            check_fits(adapter, self.components, "the file")
        except AdapterFileError:
            raise RequestError(f"This file cannot be used: {self._does_not_fit(adapter.info)}") from None
        final = self.folder / f"{secrets.token_hex(8)}.safetensors"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            shutil.copyfile(path, temporary)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        self.refresh()
        return next(entry for entry in self._entries.values() if entry.path == final)


def base_name(base: str | None) -> str:
    """The last part of a hub id or a path: what people call a base."""
    return (base or "").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _visible(relative: Path) -> bool:
    """Not hidden, and no checkpoint of a training run."""
    return not any(part.startswith((".", "checkpoint-")) for part in relative.parts)


def plain(message: str, *paths: Path) -> str:
    """A message for strangers: without the given paths, and without anything else that looks like one."""
    for path in paths:
        for spelling in (str(path.absolute()), str(path)):
            message = message.replace(f"{spelling}: ", "").replace(spelling, path.name)
    return re.sub(r"(?<![\w.])/[\w./-]+/([\w.-]+)", r"\1", message)
