"""Cells of a comparison: one method at one learning rate on one subject and seed, trained, pictured and scored; and
trials, which are judged by pictures that they were not shown.

Each has a folder of its own with `cell.json`, which is there once all of it is finished; a cell's has its images as
well, and its weights but for full fine-tuning. Any number of processes may work on the same ones: a file lock says who
is at one.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout
from PIL import Image

from s2ft_diffusion.errors import InputError

from .encoders import Encoders
from .generation import image_path, make_images, picturing, read_images, write_image
from .methods import BASE, DRAWN, Method
from .prompts import Prompt, drift_prompts
from .protocol import Protocol
from .scores import add_drift, score_images, score_real
from .subjects import Subject
from .training import held_out_loss, train

RESULT, FAILURE = "cell.json", "failure.txt"


@dataclass(frozen=True)
class Cell:
    """One training of the comparison."""

    root: Path
    method: Method
    rate: float
    subject: Subject
    seed: int

    kept_in: ClassVar[str] = "cells"

    @property
    def folder(self) -> Path:
        rate = f"{self.rate:.2e}" if self.method.trains else self.method.name
        return self.root / self.kept_in / self.method.name / rate / f"{self.subject.name}-{self.seed}"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def result(self) -> dict[str, Any] | None:
        """What came of it; None while it is not finished, and where the method was another one then."""
        try:
            found = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except OSError:
            return None
        return found if found["definition"] == self.method.definition() else None

    def failure(self, since: float = 0.0) -> str | None:
        """The error it ended in, if that was after a time."""
        path = self.folder / FAILURE
        if self.result() is not None or not path.exists() or path.stat().st_mtime < since:
            return None
        return path.read_text(encoding="utf-8").strip().splitlines()[-1]

    def __str__(self) -> str:
        rate = f" at {self.rate:.2g}" if self.method.trains else ""
        return f"{self.method.name}{rate}, {self.subject.name}, seed {self.seed}"


class Trial(Cell):
    """A training that is judged by pictures it was not shown, and makes none itself."""

    kept_in = "trials"

    def __str__(self) -> str:
        return f"trial of {super().__str__()}"


class Laboratory:
    """Makes cells: with the protocol, the encoders and a device at hand."""

    def __init__(self, protocol: Protocol, encoders: Encoders, device: str) -> None:
        self.protocol, self.encoders, self.device = protocol, encoders, device

    def make(self, cell: Cell) -> None:
        """Make a cell or a trial; its result is written last."""
        begun = time.perf_counter()
        cell.folder.mkdir(parents=True, exist_ok=True)
        work = self._try_out if isinstance(cell, Trial) else self._draw if cell.method == DRAWN else self._picture
        found = work(cell)
        result = {
            "method": cell.method.name, "definition": cell.method.definition(), "rate": cell.rate,
            "subject": cell.subject.name, "seed": cell.seed, **found,
            "cell_seconds": round(time.perf_counter() - begun, 2),
        }  # fmt: skip
        temporary = cell.folder / f"{RESULT}.tmp"
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
        temporary.replace(cell.folder / RESULT)
        (cell.folder / FAILURE).unlink(missing_ok=True)

    def _try_out(self, trial: Trial) -> dict[str, Any]:
        run = self.protocol.run(trial.subject, trial.seed)
        run = replace(run, held_out=trial.subject.held_out(), priors=trial.root / "priors")
        return {"held_out_loss": held_out_loss(trial.method, trial.rate, run, self.device)}

    def _draw(self, cell: Cell) -> dict[str, Any]:
        """Have the subject drawn as the prompts want it, and score that."""
        prompts, real = self.protocol.prompts(cell.subject), cell.subject.real()
        made = {p: cell.subject.toy.drawn(p.plain, self.protocol.images_per_prompt) for p in prompts}
        for prompt, images in made.items():
            for number, image in enumerate(images):
                write_image(image, image_path(cell.images, prompt.text, number))
        scores = score_images(self.encoders, real, made)
        return {"scores": scores.to_json(), "real": score_real(self.encoders, real, _side(made)).to_json()}

    def _picture(self, cell: Cell) -> dict[str, Any]:
        """Train, picture and score."""
        protocol, subject = self.protocol, cell.subject
        for leftover in cell.images.rglob("*.png"):  # of a run that was stopped: its weights are gone
            leftover.unlink()
        trained = train(cell.method, cell.rate, protocol.run(subject, cell.seed), self.device)
        if trained.weights is not None:
            (cell.folder / "weights.safetensors").write_bytes(trained.weights)
        pipe = picturing(trained.base)
        prompts, away = protocol.prompts(subject), drift_prompts(subject.class_name)
        seeds, few = range(protocol.images_per_prompt), range(protocol.drift_images)
        wanted = [(p.text, s) for p in prompts for s in seeds] + [(p, s) for p in away for s in few]
        # On a GPU as many at once as keep it busy: an image has a seed of its own, whatever it is made beside.
        at_once = 64 if self.device.startswith("cuda") else protocol.images_per_prompt
        make_images(pipe, cell.images, wanted, protocol.sampling, str(cell), batch_size=at_once)
        made = {prompt: read_images(cell.images, prompt.text, seeds) for prompt in prompts}
        real = subject.real()
        scores = score_images(self.encoders, real, made)
        base = Cell(cell.root, BASE, 0.0, subject, 0)
        add_drift(scores, self.encoders, *(_images(c, away, few) for c in (base if cell.method.trains else cell, cell)))
        return {
            "trainable": trained.trainable, "share": trained.share, "bytes": trained.bytes,
            "seconds": round(trained.seconds, 2), "peak_mb": round(trained.peak_bytes / 1e6, 1),
            "scores": scores.to_json(), "real": score_real(self.encoders, real, _side(made)).to_json(),
            "losses": [round(value, 5) for value in trained.losses],
        }  # fmt: skip

    def make_references(self, root: Path, subjects: Sequence[Subject]) -> list[Cell]:
        """The finished cells that all others are beside: of the base itself, and of each subject that can be drawn.

        Raises RuntimeError.
        """
        cells = [Cell(root, BASE, 0.0, subject, 0) for subject in subjects]
        cells += [Cell(root, DRAWN, 0.0, subject, 0) for subject in subjects if subject.toy]
        if failed := self.make_all(cells):
            raise RuntimeError(f"{failed[0]} failed: {failed[0].failure()}")
        return cells

    def make_all(self, cells: Sequence[Cell]) -> list[Cell]:
        """Make every cell that is not finished; returns those that failed.

        A cell that fails leaves its traceback in its folder and is tried again by the next call. Returns when all are
        finished or have failed, here or in another process.
        """
        since, open_cells, failed = time.time(), list(dict.fromkeys(cells)), []
        while open_cells:
            waiting = []
            for cell in open_cells:
                if cell.result() is not None:
                    continue
                if cell.failure(since):
                    failed.append(cell)
                elif not self._try(cell, since):
                    waiting.append(cell)
                elif cell.result() is None:
                    failed.append(cell)
            if len(waiting) == len(open_cells):
                time.sleep(1.0)
            open_cells = waiting
        return failed

    def _try(self, cell: Cell, since: float) -> bool:
        """Make a cell unless another process is at it; whether it was its turn."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(cell.folder / "lock", blocking=False):
                if cell.result() is not None or cell.failure(since):
                    return True
                try:
                    self.make(cell)
                    print(f"{cell}: done", flush=True)
                except InputError:
                    raise
                except Exception as error:
                    (cell.folder / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
                    print(f"{cell}: failed: {error}", flush=True)
                return True
        except Timeout:
            return False


def _side(made: Mapping[Prompt, Sequence[Image.Image]]) -> int:
    return next(iter(made.values()))[0].width


def _images(cell: Cell, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    return [image for prompt in prompts for image in read_images(cell.images, prompt, seeds)]
