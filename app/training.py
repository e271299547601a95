"""Trainings: one at a time, in order, each the real trainer in a process of its own.

A job is a folder: the photos as we encoded them, the trainer's output folder with its `progress.jsonl`, and `job.json`.
What is shown is read from those files, so that a page can be reloaded and the app restarted.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from s2ft_diffusion.adapters.file import WEIGHTS_NAME
from s2ft_diffusion.dreambooth.checkpoints import list_checkpoints
from s2ft_diffusion.dreambooth.phases import PROGRESS_NAME
from s2ft_diffusion.text import as_argument

from . import limits
from .library import plain
from .limits import RequestError
from .photos import instance_prompt, store_photos

logger = logging.getLogger("app")
TRAINER = Path(__file__).resolve().parents[1] / "train_dreambooth_s2ft.py"
UNFINISHED = ("waiting", "running")
INTERRUPTED = 130  # the trainer's exit code after Ctrl-C
MAX_STARTS = 3
REPORT_NAME = "training.json"  # the last thing that the trainer writes
PATIENCE = 20.0  # seconds between asking the trainer to stop and stopping it


@dataclass
class Job:
    """One training: what was asked for, and how it stands ("waiting", "running", "done", "failed", "cancelled").

    `starts` counts how often it was begun: an app that was stopped goes on with it when it is started again.
    """

    id: str
    subject: str
    class_name: str
    steps: int
    n_frequency: int
    user: str | None = None
    submitted: float = 0.0
    state: str = "waiting"
    message: str = ""
    adapter: str | None = None
    starts: int = 0
    process: int | None = None


@dataclass
class Progress:
    """How far a job is: finished phases with their summaries, the phase under way, losses by step, sample images."""

    phases: list[tuple[str, str]] = field(default_factory=list)
    phase: str | None = None
    steps: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)


class TrainingQueue:
    """Jobs under `folder`; `finished(path)` is told of every new adapter and returns its id.

    `flags` are further ones for the trainer.
    """

    def __init__(
        self,
        folder: Path,
        base: str,
        finished: Callable[[Path], str],
        *,
        device: str = "cpu",
        flags: Sequence[str] = (),
    ) -> None:
        self.folder, self.base, self.finished, self.device, self.flags = folder, base, finished, device, tuple(flags)
        self.jobs: dict[str, Job] = {}
        self._wake = threading.Condition()
        self._child: tuple[str, subprocess.Popen] | None = None
        self._closed = False
        folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._thread = threading.Thread(target=self._work, name="training", daemon=True)
        self._thread.start()

    def submit(
        self,
        photos: Sequence[Path],
        subject: Any,
        class_name: Any,
        steps: Any,
        n_frequency: Any,
        user: str | None,
        captions: Any = (),
    ) -> Job:
        """Queue a training; raises RequestError for input that cannot work.

        `captions`: words that follow the prompt, one for each photo or "", or none at all.
        """
        name = secrets.token_hex(6)
        job = Job(
            id=name,
            subject=limits.text("The subject's name", subject, limits.WORDS_LENGTH, required=True),
            class_name=limits.text("The class", class_name, limits.WORDS_LENGTH, required=True),
            steps=limits.whole("The number of steps", steps, limits.TRAIN_STEPS),
            n_frequency=limits.whole("The numbers a layer", n_frequency, limits.TRAIN_NUMBERS),
            user=user,
            submitted=time.time(),
        )
        if not isinstance(captions, Sequence) or isinstance(captions, str) or len(captions) not in (0, len(photos)):
            raise RequestError(f"Captions must be a list with one for each of the {len(photos)} photos.")
        words = [limits.text("A caption", caption, limits.CAPTION_LENGTH) for caption in captions]
        unfinished = [other.user for other in list(self.jobs.values()) if other.state in UNFINISHED]
        if len(unfinished) >= limits.TRAININGS or (user and unfinished.count(user) >= limits.USER_TRAININGS):
            raise RequestError("There are too many trainings waiting already; try again when one has ended.")
        prompts = [f"{instance_prompt(job.class_name)} {word}" if word else "" for word in words]
        store_photos(photos, self.folder / name / "photos", prompts)
        with self._wake:
            self._save(job)
            self.jobs[name] = job
            self._wake.notify_all()
        return job

    def of(self, user: str | None) -> list[Job]:
        """A user's jobs, in the order in which they were queued."""
        return [job for job in list(self.jobs.values()) if job.user == user]

    def latest(self, user: str | None) -> Job | None:
        """The job to show a user: the one running or waiting, else the last."""
        own = self.of(user)
        active = [job for job in own if job.state in UNFINISHED]
        return active[0] if active else own[-1] if own else None

    def get(self, name: object, user: str | None) -> Job:
        """A user's job by id; raises RequestError."""
        job = self.jobs.get(name) if isinstance(name, str) else None
        if job is None or job.user != user:
            raise RequestError("There is no such training.")
        return job

    def place(self, job: Job) -> int:
        """How many jobs come before a waiting one."""
        earlier = itertools.takewhile(lambda other: other is not job, self.jobs.values())
        return sum(other.state in UNFINISHED for other in earlier)

    def cancel(self, job: Job) -> None:
        """Stop a job, waiting or running."""
        with self._wake:
            if job.state not in UNFINISHED:
                return
            waited = job.state == "waiting"
            self._set(job, state="cancelled", message="cancelled")
            if self._child and self._child[0] == job.id:
                _stop(self._child[1])
        if waited:
            self._tidy(job)

    def progress(self, job: Job) -> Progress:
        """Read how far a job is."""
        found = Progress(steps=job.steps)
        try:
            lines = (self.folder / job.id / "out" / PROGRESS_NAME).read_text(encoding="utf-8").splitlines()
        except OSError:
            return found
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # being written
            if "summary" in event:
                found.phases.append((event["phase"], plain(event["summary"])))
                found.phase = None
            elif "phase" in event:
                found.phase = event["phase"]
            elif "step" in event:
                found.losses[event["step"]] = event["loss"]
            elif "images" in event:
                found.samples = [path for path in map(Path, event["images"]) if path.is_file()]
        return found

    def close(self) -> None:
        """Stop what is running, with a checkpoint; it goes on when there is an app on this folder again.

        Returns when it has stopped: this process may end then, and could not stop it any more.
        """
        with self._wake:
            self._closed = True
            if self._child:
                _stop(self._child[1])
            self._wake.notify_all()
        self._thread.join(2 * PATIENCE)

    # The worker

    def _work(self) -> None:
        while True:
            with self._wake:
                waiting = [job for job in self.jobs.values() if job.state == "waiting"]
                if self._closed:
                    return
                if not waiting:
                    self._wake.wait()
                    continue
                job = waiting[0]
            try:
                with self._wake:
                    if job.state != "waiting":  # cancelled just now
                        continue
                    self._set(job, state="running", starts=job.starts + 1)
                self._run(job)
            except Exception as error:  # whatever it is, the next job shall run
                logger.exception("training %s failed", job.id)
                reason = str(error) if isinstance(error, RequestError) else type(error).__name__
                try:
                    self._end(job, "failed", f"the training could not be run ({reason})")
                except OSError:  # its folder is gone, or the disk is full
                    job.state, job.message = "failed", "the training could not be run, nor its state be written"
            if job.state not in UNFINISHED:
                self._tidy(job)

    def _run(self, job: Job) -> None:
        folder = self.folder / job.id
        photos, output = folder / "photos", folder / "out"
        begun = ("--resume_from_checkpoint", "latest") if list_checkpoints(output) else ("--overwrite_output_dir",)
        prompt = as_argument(instance_prompt(job.class_name))
        command = [
            sys.executable, str(TRAINER),
            "--pretrained_model_name_or_path", self.base,
            "--instance_dir", str(photos),
            f"--subject={as_argument(job.subject)}",  # it may begin with a dash
            "--instance_prompt", prompt,
            "--output_dir", str(output), *begun,
            "--max_train_steps", str(job.steps),
            "--n_frequency", str(job.n_frequency),
            "--validation_prompt", prompt, "--num_validation_images", "2",
            "--validation_epochs", str(math.ceil(job.steps / (4 * len(list(photos.glob("*.png")))))),
            "--adapter_dtype", "float16",
            "--report_to", "none",
            *self.flags,
        ]  # fmt: skip
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            # The app generates meanwhile: two programs with a thread on every core would stall each other.
            threads = max(1, (os.cpu_count() or 2) // 2)
            environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        elif self.device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = self.device.removeprefix("cuda:")
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            with self._wake:
                self._child = (job.id, child)
                if job.state == "running":
                    self._set(job, process=child.pid)
                if job.state == "cancelled" or self._closed:
                    _stop(child)
            code = child.wait()
            with self._wake:
                self._child = None
                if code == INTERRUPTED:  # Ctrl-C in a terminal reaches both: the app is about to close
                    self._wake.wait_for(lambda: self._closed or job.state == "cancelled", timeout=2.0)
        if job.state == "cancelled" or self._closed:
            return
        result = folder / "out" / WEIGHTS_NAME
        if code != 0 or not result.is_file():
            self._end(job, "failed", _last_words(folder / "log.txt", code))
            return
        self._end(job, "done", "", self.finished(result))

    def _end(self, job: Job, state: str, message: str, adapter: str | None = None) -> None:
        with self._wake:
            if job.state == "cancelled":
                state, message = job.state, job.message
            self._set(job, state=state, message=message, adapter=adapter)

    # Files

    def _set(self, job: Job, **changes: Any) -> None:
        """Change a job, in its file first: what has been seen here is there after a crash too."""
        self._save(replace(job, **changes))
        for name, value in changes.items():
            setattr(job, name, value)

    def _save(self, job: Job) -> None:
        path = self.folder / job.id / "job.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(job)), encoding="utf-8")
        os.replace(temporary, path)

    def _tidy(self, job: Job) -> None:
        """Remove what a job that has ended needs no more: people's photos, and its checkpoints."""
        folder = self.folder / job.id
        for place in (folder / "photos", *list_checkpoints(folder / "out")):
            shutil.rmtree(place, ignore_errors=True)

    def _restore(self) -> None:
        found = []
        for path in self.folder.glob("*/job.json"):
            try:
                found.append(Job(**json.loads(path.read_text(encoding="utf-8"))))
            except (TypeError, ValueError):
                continue
        for job in sorted(found, key=lambda job: job.submitted):
            self.jobs[job.id] = job
            if job.state == "running":
                self._take_up(job)
            if job.state not in UNFINISHED:
                self._tidy(job)

    def _take_up(self, job: Job) -> None:
        """A job that an app before this one was at: done meanwhile, or to go on from its checkpoint."""
        output = self.folder / job.id / "out"
        _stop_orphan(job.process, output)
        if (output / WEIGHTS_NAME).is_file() and (output / REPORT_NAME).is_file():
            try:
                self._set(job, state="done", adapter=self.finished(output / WEIGHTS_NAME), process=None)
            except RequestError as error:
                self._set(job, state="failed", message=str(error), process=None)
        elif job.starts >= MAX_STARTS:
            self._set(
                job, state="failed", message="the app was stopped again and again before it was done", process=None
            )
        else:
            self._set(job, state="waiting", process=None)


def _stop_orphan(process: int | None, output: Path) -> None:
    """Stop a trainer whose app was killed: there must not be two at one folder."""
    if process is None:
        return
    try:
        trainer = psutil.Process(process)
        if str(output) not in trainer.cmdline():
            return  # another process has the number now
        trainer.send_signal(signal.SIGINT)
        try:
            trainer.wait(PATIENCE)
        except psutil.TimeoutExpired:
            trainer.kill()
            trainer.wait(PATIENCE)
    except psutil.Error:
        return


def _stop(child: subprocess.Popen) -> None:
    """Ask first; a trainer that has not stopped after a while is killed."""
    child.send_signal(signal.SIGINT)

    def insist() -> None:
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=insist, daemon=True).start()


def _last_words(log: Path, code: int) -> str:
    """The trainer's one line of error, without paths of this machine."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith(TRAINER.name) or "Error" in line), "")
    reason = plain(said.removeprefix(f"{TRAINER.name}: ").removeprefix("error: "))[:300]
    if code < 0:
        return f"the trainer was stopped by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return reason or f"the trainer stopped with code {code}"
