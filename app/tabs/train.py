"""The Train tab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pandas as pd
from PIL import Image

from s2ft_diffusion import toybox

from .. import limits
from ..app import user_of
from ..errors import polite
from ..history import load_png
from ..library import plain
from ..limits import RequestError
from ..training import UNFINISHED, TrainingQueue
from ..words import escaped

if TYPE_CHECKING:
    from ..page import Page


def training_words(status: Mapping[str, Any]) -> str:
    """How a training stands, from `TrainTab.training_status`, as Markdown."""
    if status["state"] == "none":
        return "No training yet."
    lines = [f"### {escaped(status['subject'])}: {status['state']}"]
    if status["state"] == "waiting" and status["before"]:
        lines.append(f"{status['before']} before it.")
    if status["state"] == "failed":
        lines.append(escaped(status["message"]))
    lines += [f"* **{phase}**: {escaped(plain(summary))}" for phase, summary in status["phases"]]
    if status["phase"]:
        done = f" step {status['losses'][-1][0]} of {status['steps']}" if status["losses"] else ""
        lines.append(f"* **{status['phase']}** …{done if status['phase'] == 'train' else ''}")
    if status["state"] == "done":
        lines.append("The adapter is in the library.")
    return "\n\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:])


class TrainTab:
    def __init__(self, page: Page) -> None:
        self.page, self.app = page, page.app

    def build(self) -> None:
        small = toybox.is_embedded(self.app.engine.base)
        with gr.Row():
            with gr.Column(scale=4, min_width=280):
                photos = gr.File(
                    label="3 to 20 photos", file_count="multiple", file_types=["image"], height=170, elem_id="photos"
                )
                with gr.Row():
                    subject = gr.Textbox(label="Name of the subject", placeholder="mittens", elem_id="subject")
                    kind = gr.Textbox(label="What it is", placeholder="cat", elem_id="kind")
                steps = gr.Slider(*limits.TRAIN_STEPS, value=500, step=10, label="Steps", elem_id="train-steps")
                numbers = gr.Slider(
                    *limits.TRAIN_NUMBERS, value=8000, step=100, label="Trainable numbers a layer", elem_id="numbers"
                )
                with gr.Row():
                    go = gr.Button("Train", variant="primary", elem_id="train")
                    stop = gr.Button("Cancel", interactive=False, elem_id="cancel-training")
                words = "about a minute on two cores" if small else "minutes on a GPU, hours on a CPU"
                gr.Markdown(f"The prompt becomes *a photo of sks …*. It takes {words}; one training at a time.")
            with gr.Column(scale=5, min_width=300):
                report = gr.Markdown("No training yet.", elem_id="training")
                curve = gr.LinePlot(x="step", y="loss", title="Loss, smoothed", height=220)
                samples = gr.Gallery(label="Samples", format="png", columns=2, height=220, buttons=["download"])
        timer = gr.Timer(1.0, active=False)
        latest = gr.State("")  # always the latest job of whoever looks
        status = gr.JSON(visible=False)
        shown = [report, curve, samples, timer, stop]
        show = polite(self.show_training)
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        go.click(
            polite(self.train),
            [photos, subject, kind, steps, numbers],
            status,
            api_name="train",
            concurrency_limit=1,  # the photos of one request at a time are in memory
        ).success(show, latest, shown, **quiet)
        stop.click(
            polite(self.cancel_training), latest, status, api_name="stop", api_visibility="private", queue=False
        ).success(show, latest, shown, **quiet)
        # A job that has ended has a new adapter in the library.
        timer.tick(show, latest, shown, **quiet).then(self.page.new_choices, None, self.page.adapters, **quiet)
        self.page.blocks.load(show, latest, shown, **quiet)
        gr.api(polite(self.training_status), api_name="training_status", queue=False)
        gr.api(polite(self.cancel_training), api_name="cancel_training", queue=False)

    # What the buttons do

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
        self.app.library.check_room()  # better now than after the training
        job = self._trainings.submit(
            [Path(photo) for photo in photos or []], subject, class_name, steps, n_frequency, user_of(request)
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

    def show_training(self, name: str, request: gr.Request) -> tuple[str, pd.DataFrame, list[Image.Image], dict, dict]:
        """What the Train tab shows of a job: words, the loss curve, samples, whether to go on looking, the button."""
        status = self._status(name, request)
        active = status["state"] in UNFINISHED
        losses = pd.DataFrame(status.get("losses", []), columns=["step", "loss"])
        if len(losses) > 1:
            losses["loss"] = losses["loss"].ewm(span=max(2, len(losses) // 15)).mean()
        samples = []
        if status["job"]:
            job = self._trainings.get(status["job"], user_of(request))
            for path in self._trainings.progress(job).samples:
                try:
                    samples.append(load_png(path))
                except OSError:
                    continue  # being replaced
        return training_words(status), losses, samples, gr.Timer(active=active), gr.update(interactive=active)
