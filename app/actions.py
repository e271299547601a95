"""What the page's buttons do, and what the API's endpoints are: methods of `App`, whose docstrings document both."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from filelock import BaseFileLock
from PIL import Image

from . import compare, inspection, limits
from .descriptions import caption, details, training_words
from .engine import Engine, Listener, Settings
from .history import History, load_png, settings_of
from .library import Library
from .limits import RequestError
from .running import Running
from .training import UNFINISHED, TrainingQueue

logger = logging.getLogger("app")
NONE = ""  # the id of no adapter


def polite(action: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into messages: those meant for the person as they are, all others without their details."""

    def translate(error: Exception) -> gr.Error:
        if isinstance(error, RequestError):
            return gr.Error(str(error), print_exception=False)
        logger.exception("%s failed", action.__name__)
        return gr.Error("Something went wrong here; the server's log says what.", print_exception=False)

    @wraps(action)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise translate(error) from None

    @wraps(action)
    def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise translate(error) from None

    return iterate if inspect.isgeneratorfunction(action) else run


@dataclass
class App:
    """Everything the page's buttons do."""

    engine: Engine
    library: Library
    history: History
    trainings: TrainingQueue | None = None
    lock: BaseFileLock | None = None  # on the folder of outputs; let go when the app is closed

    def __post_init__(self) -> None:
        self._running = Running(self.engine.threads)
        self._copies: dict[tuple[str, int, float], str] = {}
        self._downloads = Path(tempfile.mkdtemp(prefix="s2ft-app-"))

    def close(self) -> None:
        """Stop what is under way, and leave no temporary files."""
        self._running.cancel_all()
        self.engine.threads.shutdown()
        if self.trainings is not None:
            self.trainings.close()
        shutil.rmtree(self._downloads, ignore_errors=True)
        if self.lock is not None:
            self.lock.release()

    # Library

    def list_adapters(self, words: str = "", sort: str = "newest") -> list[dict[str, Any]]:
        """The adapters that are there, by what their headers say; looks for new files first.

        Args:
            words: only adapters in whose name, subject, prompt or base all these words occur.
            sort: "newest", "name", "smallest" or "fewest numbers".
        """
        self.library.refresh()
        found = self.library.search(limits.text("The search", words, 200), sort)
        return [entry.summary() for entry in found]

    def gallery(self, words: str, sort: str) -> tuple[list[tuple[Image.Image, str]], list[str]]:
        """The library's tiles with captions, and their ids."""
        self.library.refresh()
        found = self.library.search(limits.text("The search", words, 200), sort)
        return [(entry.picture(), caption(entry)) for entry in found], [entry.id for entry in found]

    def details(self, adapter: str) -> str:
        """An adapter's header as Markdown; also of one that cannot be used."""
        found = [entry for entry in self.library.search() if entry.id == adapter]
        return details(found[0]) if found else ""

    def choices(self) -> list[tuple[str, str]]:
        """Labels and ids for a dropdown."""
        return [("none", NONE), *self.library.choices()]

    def prompt_of(self, adapter: str) -> str:
        """An adapter's instance prompt, "" where it says none."""
        return (self.library.get(adapter).info.instance_prompt or "") if adapter else ""

    def upload_adapter(self, file: str) -> dict[str, Any]:
        """Add a .safetensors adapter to the library, if it passes the strict reader and fits the base.

        Args:
            file: the file to upload.
        """
        if not file:
            raise RequestError("Choose a file first.")
        return self.library.add(Path(file)).summary()

    def download_adapter(self, adapter: str) -> str:
        """The file of an adapter.

        Args:
            adapter: its id.
        """
        entry = self.library.get(adapter)
        if entry.state not in self._copies:
            folder = Path(tempfile.mkdtemp(dir=self._downloads))
            safe = "".join(c if c.isalnum() else "-" for c in entry.name).strip("-")[:60] or "adapter"
            self._copies[entry.state] = str(shutil.copyfile(entry.path, folder / f"{safe}.safetensors"))
        return self._copies[entry.state]

    # Generate

    def generate(
        self,
        prompt: str,
        negative_prompt: str,
        adapter: str,
        strength: float,
        second_adapter: str,
        second_strength: float,
        steps: float,
        guidance: float,
        seed: float,
        images: float,
        scheduler: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio wants it)
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Generate images, each a PNG that carries its settings.

        Args:
            prompt: what to show.
            negative_prompt: what not to show.
            adapter: id of an adapter, or "" for the base alone.
            strength: 0 to 1.5.
            second_adapter: id of an adapter to mix in, or "".
            second_strength: 0 to 1.5.
            steps: denoising steps, 1 to 100.
            guidance: classifier-free guidance, 0 to 30.
            seed: of the first image; each further one has the next.
            images: 1 to 8.
            scheduler: one of the schedulers' names.
        """
        settings = Settings.checked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            adapters=((adapter, strength), (second_adapter, second_strength)),
            steps=steps,
            guidance=guidance,
            seed=seed,
            images=images,
            scheduler=scheduler,
        )
        made: list[tuple[str, str]] = []  # files, so that showing an image again does not encode it again
        signatures: list[str] = []
        user = _user(request)

        def work(listener: Listener) -> Iterator[Image.Image]:
            return self.engine.iterate(settings, self.library, listener)

        for now in self._running.watch(work, request.session_hash):
            if now.image is None:
                progress((now.done, now.total), desc="denoising", unit="steps")
                yield now.preview, gr.skip(), f"step {now.done} of {now.total}", gr.skip()
                continue
            self.history.save(now.image, user)
            file = gr.processing_utils.save_pil_to_cache(
                now.image, str(self._downloads), name=f"image-{len(made)}", format="png"
            )
            made.append((file, f"seed {settings.single(len(made)).seed}"))
            signatures.append(now.image.info["s2ft"])
            if len(made) < settings.images:  # shown at once: should the page cancel the event, it has no last word
                yield gr.skip(), made, gr.skip(), signatures
        status = "done" if len(made) == settings.images else f"cancelled, {len(made)} of {settings.images} images"
        yield None, made, status, signatures

    def cancel(self, request: gr.Request) -> str:
        """Stop what this session is generating or comparing; images that are finished stay."""
        return "cancelled" if self._running.cancel(request.session_hash) else "nothing to cancel"

    # History

    def list_history(self, request: gr.Request) -> tuple[list[tuple[Image.Image, str]], list[str]]:
        """The latest images that were made here, the newest first, with their ids."""
        shown, ids = [], []
        for path in self.history.latest(_user(request)):
            try:
                image = load_png(path)
                prompt = settings_of(image).prompt
            except (OSError, RequestError):
                continue
            shown.append((image, prompt[:60]))
            ids.append(path.stem)
        return shown, ids

    def image_settings(self, image: str, request: gr.Request) -> dict[str, Any]:
        """The settings that an image of the history was made with.

        Args:
            image: its id.
        """
        return json.loads(settings_of(self.history.open(_user(request), image)).to_json())

    # Compare

    def compare(
        self,
        prompt: str,
        adapter: str,
        second_adapter: str,
        strengths: str,
        steps: float,
        guidance: float,
        seed: float,
        seeds: float,
        scheduler: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        """The same seeds side by side: the base, each adapter at each strength, and both together.

        Args:
            prompt: what to show.
            adapter: id of an adapter.
            second_adapter: id of another, or "".
            strengths: numbers from 0 to 1.5, separated by commas; at most six.
            steps: denoising steps, 1 to 100.
            guidance: classifier-free guidance, 0 to 30.
            seed: of the first row; each further one has the next.
            seeds: rows, 1 to 4.
            scheduler: one of the schedulers' names.
        """
        values = parse_strengths(strengths)
        settings = Settings.checked(
            prompt=prompt,
            adapters=((adapter, 1.0), (second_adapter, 1.0)),
            steps=steps,
            guidance=guidance,
            seed=seed,
            images=limits.whole("The number of seeds", seeds, (1, 4)),
            scheduler=scheduler,
        )
        if not settings.adapters:
            raise RequestError("Choose an adapter to compare.")
        columns = compare.variants(settings, self.library, values)

        def work(listener: Listener) -> Iterator[Image.Image]:
            yield compare.compare(self.engine, self.library, columns, listener)

        for now in self._running.watch(work, request.session_hash):
            if now.image is not None:
                yield now.image
                return
            progress((now.done, now.total), desc="denoising", unit="steps")
            yield gr.skip()  # here a closed page ends it
        raise RequestError("Cancelled.")

    # Train

    def train(
        self, photos: list[str], subject: str, class_name: str, steps: float, n_frequency: float, request: gr.Request
    ) -> dict[str, Any]:
        """Queue the training of an adapter; `training_status` says how it goes.

        Args:
            photos: 3 to 20 images of the subject.
            subject: its name, for the library.
            class_name: what it is, such as "dog"; the prompt becomes "a photo of sks dog".
            steps: optimizer steps, 10 to 5000.
            n_frequency: trainable numbers a layer.
        """
        self.library.check_room()  # better now than after the training
        job = self._trainings.submit(
            [Path(photo) for photo in photos or []], subject, class_name, steps, n_frequency, _user(request)
        )
        return self._status(job.id, request)

    def training_status(self, job: str = "", request: gr.Request = None) -> dict[str, Any]:
        """How a training stands: its state, finished phases, loss by step, and the id of its adapter when done.

        Args:
            job: its id; "" for the latest.
        """
        return self._status(job, request)

    def cancel_training(self, job: str = "", request: gr.Request = None) -> dict[str, Any]:
        """Stop a training, waiting or running.

        Args:
            job: its id; "" for the latest.
        """
        status = self._status(job, request)
        if status["job"]:
            self._trainings.cancel(self._trainings.get(status["job"], _user(request)))
        return self._status(job, request)

    @property
    def _trainings(self) -> TrainingQueue:
        if self.trainings is None:
            raise RequestError("Training is switched off here.")
        return self.trainings

    def _status(self, name: str, request: gr.Request) -> dict[str, Any]:
        user = _user(request)
        job = self._trainings.get(name, user) if name else self._trainings.latest(user)
        if job is None:
            return {"job": None, "state": "none"}
        progress = self._trainings.progress(job)
        return {
            "job": job.id,
            "subject": job.subject,
            "state": job.state,
            "message": job.message,
            "before": self._trainings.place(job) if job.state == "waiting" else 0,
            "phases": progress.phases,
            "phase": progress.phase if job.state == "running" else None,
            "steps": progress.steps,
            "losses": [[step, loss] for step, loss in sorted(progress.losses.items())],
            "adapter": job.adapter,
        }

    def show_training(self, name: str, request: gr.Request) -> tuple[str, pd.DataFrame, list[Image.Image], dict, dict]:
        """What the Train tab shows of a job: words, the loss curve, samples, whether to go on looking, the button."""
        status = self._status(name, request)
        active = status["state"] in UNFINISHED
        losses = pd.DataFrame(status.get("losses", []), columns=["step", "loss"])
        if len(losses) > 1:
            losses["loss"] = losses["loss"].ewm(span=max(2, len(losses) // 15)).mean()
        samples = []
        if status["job"]:
            job = self._trainings.get(status["job"], _user(request))
            for path in self._trainings.progress(job).samples:
                try:
                    samples.append(load_png(path))
                except OSError:
                    continue  # being replaced
        return training_words(status), losses, samples, gr.Timer(active=active), gr.update(interactive=active)

    # Inspect

    def inspect(self, adapter: str, layer: str = "") -> tuple[pd.DataFrame, list[tuple[Image.Image, str]], dict]:
        """What is in an adapter: the size of each layer's weight change, and one layer's pictures.

        Args:
            adapter: its id.
            layer: "component.module"; "" for the layer with the largest change.
        """
        entry = self.library.get(adapter)
        sizes = inspection.energies(entry.path)
        names = [name for name, _ in sizes]
        layer = layer if layer in names else max(sizes, key=lambda pair: pair[1])[0]
        rounded = [round(size, 4) for _, size in sizes]
        frame = pd.DataFrame({"number": range(1, len(names) + 1), "layer": names, "size": rounded})
        return frame, inspection.pictures(entry.path, layer), gr.update(choices=names, value=layer)


def _user(request: gr.Request) -> str | None:
    return getattr(request, "username", None)


def parse_strengths(text: str) -> list[float]:
    """ "0.5, 1" to numbers; raises RequestError."""
    try:
        values = [float(part) for part in limits.text("The strengths", text, 100).replace(";", ",").split(",") if part]
    except ValueError:
        raise RequestError("The strengths must be numbers separated by commas.") from None
    if not 1 <= len(values) <= 6:
        raise RequestError("One to six strengths can be compared.")
    return [limits.number("A strength", value, limits.STRENGTH) for value in values]
