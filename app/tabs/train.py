"""The Train tab."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd

from s2ft_diffusion import toybox

from .. import limits
from ..app import NONE, given_out, user_of
from ..errors import polite
from ..library import plain
from ..limits import RequestError
from ..photos import load_photo
from ..training import UNFINISHED, TrainingQueue
from ..words import escaped
from .parts import PRIVATE, QUIET, menu, photos, reveal, small

if TYPE_CHECKING:
    from ..page import Page


JOBS = 20  # the latest, to choose from
PHASES = {
    "load": "Loading the base model",
    "estimate": "Looking at your photos, to see which numbers matter",
    "rearrange": "Choosing which numbers to train",
    "train": "Training",
    "validate": "Making sample pictures",
    "save": "Saving the adapter",
}
STATES = {
    "waiting": "waiting for its turn",
    "running": "under way",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}


def training_words(status: Mapping[str, Any], left: float | None = None) -> str:
    """How a training stands, from `TrainTab.training_status`, as Markdown; `left`: seconds."""
    if status["state"] == "none":
        return "No training yet."
    lines = [f"## {escaped(status['subject'])}: {STATES[status['state']]}"]
    if status["state"] == "waiting" and status["before"]:
        lines.append(f"{status['before']} before it.")
    if status["state"] == "failed":
        lines.append(escaped(status["message"]))
    lines += [f"* **{PHASES.get(name, name)}**: {escaped(plain(summary))}" for name, summary in status["phases"]]
    if status["phase"]:
        now = PHASES.get(status["phase"], status["phase"])
        done = f" step {status['losses'][-1][0]} of {status['steps']}" if status["losses"] else ""
        rest = f", {time_words(left)} left" if left is not None else ""
        lines.append(f"* **{now}** …{done + rest if status['phase'] == 'train' else ''}")
    if status["state"] == "done":
        lines.append("The adapter is in the library.")
    return "\n\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:])


def time_words(seconds: float) -> str:
    """About how long, in words."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    return f"about {round(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


class TrainTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app
        self._seen: dict[str, tuple[int, float]] = {}  # a step of each job, and when it was seen

    def build(self) -> None:
        embedded = toybox.is_embedded(self.app.engine.base)
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                self.photos = gr.File(
                    label="3 to 20 photos", file_count="multiple", file_types=["image"], height=150, elem_id="photos"
                )
                with gr.Column(visible=False, elem_id="thumbnails") as self.each:
                    gr.Markdown("What else is in each photo, if you like: it is then not taken for the subject.")
                    self.captions = photos(limits.CAPTION_LENGTH, elem_id="captions")
                with gr.Row():
                    self.subject = gr.Textbox(
                        label="Name of the subject", placeholder="mittens", min_width=120, elem_id="subject"
                    )
                    self.kind = gr.Textbox(label="What it is", placeholder="cat", min_width=120, elem_id="kind")
                self.steps = gr.Slider(*limits.TRAIN_STEPS, value=500, step=10, label="Steps", elem_id="train-steps")
                self.numbers = gr.Slider(
                    *limits.TRAIN_NUMBERS, value=2000, step=100, label="Trainable numbers a layer", elem_id="numbers"
                )
                with gr.Row():
                    self.go = gr.Button("Train", variant="primary", interactive=False, elem_id="train")
                    self.stop = gr.Button("Cancel", interactive=False, elem_id="cancel-training")
                words = "about a minute on two cores" if embedded else "minutes on a GPU, hours on a CPU"
                gr.Markdown(f"The prompt becomes *a photo of sks …*. It takes {words}; one training at a time.")
            with gr.Column(scale=5, min_width=300):
                self.jobs = menu("Trainings", visible=False, elem_id="jobs")
                self.report = gr.Markdown("No training yet.", elem_id="training")
                self.try_it = gr.Button("Try it", variant="primary", visible=False, elem_id="try-it")
                self.curve = gr.LinePlot(x="step", y="loss", title="Loss, smoothed", height=220, elem_id="curve")
                self.samples = gr.Gallery(
                    label="Samples", format="png", columns=2, height=220, buttons=["download"], elem_id="samples"
                )
        self.timer = gr.Timer(1.0, active=False)
        self.adapter = gr.State(NONE)
        self.status = gr.JSON(visible=False)

    def wire(self) -> None:
        gr.api(polite(self.training_status), api_name="training_status", queue=False)
        gr.api(polite(self.cancel_training), api_name="cancel_training", queue=False)
        shown = [self.report, self.curve, self.samples, self.timer, self.stop, self.try_it, self.adapter, self.jobs]
        show = polite(self.show_training)
        self.go.click(
            polite(self.train),
            [self.photos, self.subject, self.kind, self.steps, self.numbers, self.captions],
            self.status,
            api_name="train",
            concurrency_limit=1,  # the photos of one request at a time are in memory
        ).success(polite(self.submitted), self.status, shown, **QUIET).then(
            None, None, None, js=reveal("#training"), **QUIET
        )
        self.stop.click(polite(self.cancel_training), self.jobs, self.status, **QUIET).success(
            show, self.jobs, shown, **QUIET
        )
        self.timer.tick(show, self.jobs, shown, **QUIET)
        self.jobs.input(show, self.jobs, shown, trigger_mode="always_last", **QUIET)
        self.page.library.look_again(self.adapter.change)  # a training has ended: its adapter is in the library
        self.page.use_on(self.try_it, self.adapter)
        self.page.blocks.load(show, self.jobs, shown, **QUIET)
        asked = [self.photos, self.subject, self.kind]
        for part in asked:
            part.change(self.ready, asked, self.go, trigger_mode="always_last", **QUIET)
        self.photos.change(
            polite(self.shown_photos),
            self.photos,
            [self.captions, self.each],
            trigger_mode="always_last",
            concurrency_limit=1,  # one request's photos at a time are decoded
            **PRIVATE,
            show_progress="hidden",
        )

    # What the buttons do

    def train(
        self,
        photos: list[str],
        subject: str,
        class_name: str,
        steps: float,
        n_frequency: float,
        captions: list[str] | None,
        request: gr.Request,
    ) -> dict[str, Any]:
        """Queue the training of an adapter; `training_status` says how it goes.

        Args:
            photos: 3 to 20 images of the subject.
            subject: its name, for the library.
            class_name: what it is, such as "dog"; the prompt becomes "a photo of sks dog".
            steps: optimizer steps, 10 to 5000.
            n_frequency: trainable numbers a layer.
            captions: words that follow the prompt, such as "on a beach", one for each photo or "", or none at all.
        """
        self.app.library.check_room()  # better now than after the training
        job = self._trainings.submit(
            [Path(photo) for photo in photos or []],
            subject,
            class_name,
            steps,
            n_frequency,
            user_of(request),
            captions or [],
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
            self._trainings.cancel(self._trainings.get(status["job"], user_of(request)))
        return self._status(job, request)

    @property
    def _trainings(self) -> TrainingQueue:
        if self.app.trainings is None:
            raise RequestError("Training is switched off here.")
        return self.app.trainings

    def _status(self, name: str, request: gr.Request) -> dict[str, Any]:
        user = user_of(request)
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

    # What the page shows

    @staticmethod
    def ready(photos: list[str] | None, subject: str, kind: str) -> Any:
        """Whether there is all that a training needs."""
        return gr.update(interactive=bool(photos and subject.strip() and kind.strip()))

    @staticmethod
    def shown_photos(paths: list[str] | None) -> tuple[Any, Any]:
        """Small copies of the photos; one that cannot be read has none, which `train` says."""
        choices = []
        for path in paths or []:
            try:
                picture = small(load_photo(Path(path)))
            except RequestError:
                picture = ""
            choices.append({"name": path, "picture": picture})
        return gr.update(choices=choices), gr.update(visible=bool(choices))

    def submitted(self, status: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        """The job that was just queued, chosen among the user's."""
        *shown, jobs = self.show_training(status["job"], request)
        return *shown, {**jobs, "value": status["job"]}

    def show_training(self, name: str, request: gr.Request) -> tuple[Any, ...]:
        """A job in words, its loss curve, samples, whether to go on looking, the buttons, its adapter, and all jobs."""
        own = self._trainings.of(user_of(request))[::-1][:JOBS]
        status = self._status(name if name in (job.id for job in own) else "", request)
        active = status["state"] in UNFINISHED
        # With their types also where there are none yet: a plot takes its axes from the first ones that it is given.
        losses = pd.DataFrame(status.get("losses", []), columns=["step", "loss"]).astype({"step": int, "loss": float})
        if len(losses) > 1:
            losses["loss"] = losses["loss"].ewm(span=max(2, len(losses) // 15)).mean()
        samples = []
        if status["job"]:
            job = self._trainings.get(status["job"], user_of(request))
            for path in self._trainings.progress(job).samples:
                try:
                    samples.append(given_out(path, self.samples))
                except OSError:
                    continue  # being replaced
        adapter = status.get("adapter") if status["state"] == "done" else None
        adapter = adapter if adapter in self.app.library.labels() else NONE
        # What is chosen is only told where that is another one: someone may be choosing.
        chosen = {} if name == status["job"] else {"value": status["job"] or ""}
        listed = [{"id": job.id, "label": f"{job.subject}: {STATES[job.state]}"} for job in own]
        return (
            training_words(status, self._left(status)),
            losses,
            samples,
            gr.Timer(active=any(job.state in UNFINISHED for job in own)),
            gr.update(interactive=active),
            gr.update(visible=bool(adapter)),
            adapter,
            gr.update(choices=listed, visible=len(listed) > 1, **chosen),
        )

    def _left(self, status: Mapping[str, Any]) -> float | None:
        """Seconds that the steps still to come will take, by those that were seen; None before there are some."""
        if status["state"] != "running" or not status["losses"]:
            return None
        step, now = status["losses"][-1][0], time.monotonic()
        first, begun = self._seen.setdefault(status["job"], (step, now))
        return (now - begun) / (step - first) * (status["steps"] - step) if step > first else None
