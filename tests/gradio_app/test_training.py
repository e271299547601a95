"""Trainings in child processes: queued, followed, cancelled, and survived when they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from app.limits import RequestError
from app.photos import store_photos
from app.training import UNFINISHED, Job, TrainingQueue
from s2ft_diffusion.adapters.file import read_header
from tests.gradio_app.conftest import PATIENCE, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def queue(library, tmp_path):
    queue = TrainingQueue(tmp_path / "trainings", "toybox", lambda path: library.add(path).id)
    yield queue
    queue.close()


@pytest.fixture
def small(tiny_base, tmp_path):
    """A queue on the tiny base, for what is not about the adapters."""
    queue = TrainingQueue(tmp_path / "trainings", str(tiny_base), lambda path: path.name)
    yield queue
    queue.close()


def submit(queue: TrainingQueue, photos: Path, **values) -> Job:
    asked = {"subject": "My dog! 柴犬", "class_name": "dog", "steps": 12, "n_frequency": 100, "user": None, **values}
    return queue.submit(sorted(photos.glob("*.png")), **asked)


def test_a_training_ends_in_the_library(queue, photos, library) -> None:
    job = submit(queue, photos)
    second = submit(queue, photos, user="ann")
    assert queue.place(second) == 1
    assert queue.latest(None) is job
    assert queue.latest("ann") is second
    with pytest.raises(RequestError, match="no such training"):
        queue.get(job.id, "ann")
    until(lambda: job.state == "running")
    assert second.state == "waiting"  # one at a time
    queue.cancel(second)
    until(lambda: job.state not in UNFINISHED)
    assert (job.state, job.message) == ("done", "")
    entry = library.get(job.adapter)
    assert entry.name == "My dog! 柴犬"
    assert library.search("MY DOG! 柴")[0].id == entry.id
    assert entry.info.instance_prompt == "a photo of sks dog"
    assert entry.info.thumbnail
    layers = sum(map(len, read_header(entry.path).shapes.values()))
    assert 0 < entry.trainable <= layers * 100
    progress = queue.progress(job)
    assert [name for name, _ in progress.phases] == ["load", "estimate", "rearrange", "train", "validate", "save"]
    assert list(progress.losses) == list(range(1, 13))
    assert [path.name for path in progress.samples] == ["final-0.png", "final-1.png"]
    assert not any(str(queue.folder) in summary for _, summary in progress.phases)
    assert second.state == "cancelled"
    assert not (queue.folder / second.id / "out").exists()
    for ended in (job, second):  # people's photos are not kept
        until(lambda ended=ended: not (queue.folder / ended.id / "photos").exists())
    # after a restart of the app it is all still there
    again = TrainingQueue(queue.folder, "toybox", lambda path: "")
    assert again.jobs[job.id] == job
    assert again.progress(job) == progress
    again.close()


def test_a_state_is_in_its_file_before_it_is_shown(queue, photos, monkeypatch) -> None:
    saved, save = [], queue._save
    monkeypatch.setattr(
        queue,
        "_save",
        lambda job: (save(job), saved.append((getattr(queue.jobs.get(job.id), "state", None), job.state))),
    )
    submit(queue, photos, steps=5000)
    second = submit(queue, photos)
    queue.cancel(second)
    assert (None, "waiting") in saved
    assert ("waiting", "cancelled") in saved
    assert second.state == "cancelled"


def test_a_restart_keeps_the_order(tmp_path) -> None:
    for name, submitted in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        (tmp_path / name).mkdir()
        job = Job(name, "x", "dog", 10, 100, submitted=submitted, state="failed")
        (tmp_path / name / "job.json").write_text(json.dumps(asdict(job)))
    os.utime(tmp_path / "a" / "job.json", (0, 0))
    queue = TrainingQueue(tmp_path, "toybox", lambda path: "")
    queue.close()
    assert [job.id for job in queue.of(None)] == ["a", "b", "c"]


def test_cancelling_a_running_one(small, photos) -> None:
    job = submit(small, photos, steps=5000)
    until(lambda: len(small.progress(job).losses) > 3)
    small.cancel(job)
    until(lambda: small._child is None)
    assert job.state == "cancelled"
    assert json.loads((small.folder / job.id / "job.json").read_text())["state"] == "cancelled"
    follower = submit(small, photos)
    until(lambda: follower.state not in UNFINISHED)
    assert follower.state == "done"


def test_a_crash_is_reported_and_the_next_one_runs(small, photos) -> None:
    killed = submit(small, photos, steps=5000)
    until(lambda: killed.state == "running" and small._child is not None)
    os.kill(small._child[1].pid, signal.SIGKILL)
    until(lambda: killed.state not in UNFINISHED)
    assert killed.state == "failed"
    assert "signal 9" in killed.message
    refused = submit(small, photos, n_frequency=90_000)
    until(lambda: refused.state not in UNFINISHED)
    assert refused.state == "failed"
    assert "90000" in refused.message.replace(",", "")
    assert str(small.folder) not in refused.message


def test_a_restart_goes_on_with_what_it_interrupted(small, photos) -> None:
    job = submit(small, photos, steps=60)
    waiting = submit(small, photos)
    until(lambda: len(small.progress(job).losses) > 3)
    small.close()
    until(lambda: small._child is None)
    assert len(small.progress(job).losses) < 60
    again = TrainingQueue(small.folder, small.base, small.finished)
    job, waiting = again.jobs[job.id], again.jobs[waiting.id]
    until(lambda: job.state not in UNFINISHED)
    assert (job.state, job.starts) == ("done", 2)
    assert "Resuming from" in (small.folder / job.id / "log.txt").read_text()
    assert read_header(small.folder / job.id / "out" / job.adapter).info.training["steps"] == 60
    until(lambda: waiting.state not in UNFINISHED)
    assert waiting.state == "done"
    again.close()


def test_a_trainer_whose_app_was_killed_is_stopped(small, photos) -> None:
    job = submit(small, photos, steps=5000)
    until(lambda: len(small.progress(job).losses) > 3)
    trainer = small._child[1]
    small._closed = True  # from now on it stands for an app that is no more
    again = TrainingQueue(small.folder, small.base, small.finished)
    assert trainer.poll() is not None
    assert again.jobs[job.id].state in UNFINISHED
    again.cancel(again.jobs[job.id])
    again.close()


def test_what_was_done_while_there_was_no_app_is_taken_in(small, photos) -> None:
    job = submit(small, photos)
    until(lambda: job.state == "done")
    small.close()
    path = small.folder / job.id / "job.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running", "adapter": None}))
    taken = []
    again = TrainingQueue(small.folder, small.base, lambda path: taken.append(path) or "taken")
    assert (again.jobs[job.id].state, again.jobs[job.id].adapter) == ("done", "taken")
    assert read_header(taken[0]).info.subject == "My dog! 柴犬"
    again.close()


def test_a_job_whose_folder_is_gone_does_not_stop_the_others(small, photos) -> None:
    first, lost, last = submit(small, photos), submit(small, photos), submit(small, photos)
    shutil.rmtree(small.folder / lost.id)
    until(lambda: last.state not in UNFINISHED)
    assert [job.state for job in (first, lost, last)] == ["done", "failed", "done"]


def test_cancelled_the_moment_it_starts(small, photos, monkeypatch) -> None:
    set_state, started, cancelling = small._set, threading.Event(), []

    def late(job: Job, **changes) -> None:
        if changes.get("state") == "running":
            cancelling.append(threading.Thread(target=small.cancel, args=(job,)))
            cancelling[0].start()
            cancelling[0].join(1.0)
        set_state(job, **changes)
        if changes.get("state") == "running":
            started.set()

    monkeypatch.setattr(small, "_set", late)
    job = submit(small, photos, steps=5000)
    started.wait()
    cancelling[0].join()
    assert job.state == "cancelled"


def test_what_runs_has_stopped_when_the_queue_is_closed(small, photos) -> None:
    submit(small, photos, steps=5000)
    until(lambda: small._child is not None)
    trainer = small._child[1]
    small.close()
    assert trainer.poll() is not None


def test_nobody_fills_the_queue(queue, photos) -> None:
    for _ in range(3):
        submit(queue, photos, steps=5000, user="ann")
    with pytest.raises(RequestError, match="too many trainings"):
        submit(queue, photos, user="ann")
    for job in list(queue.jobs.values()):
        queue.cancel(job)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"subject": " "}, "must not be empty"),
        ({"subject": "a\ud800b"}, "characters in it that are none"),
        ({"class_name": "x" * 61}, "at most 60"),
        ({"steps": 5}, "steps must be from"),
        ({"steps": 10**9}, "steps must be from"),
        ({"n_frequency": 1}, "numbers a layer must be from"),
    ],
)
def test_bad_requests_leave_nothing_behind(queue, photos, values, match) -> None:
    with pytest.raises(RequestError, match=match):
        submit(queue, photos, **values)
    assert list(queue.folder.iterdir()) == []


def test_photos_are_checked_and_encoded_again(photos, tmp_path) -> None:
    paths = sorted(photos.glob("*.png"))
    with pytest.raises(RequestError, match="3 to 20 photos"):
        store_photos(paths[:2], tmp_path / "a")
    with pytest.raises(RequestError, match="3 to 20 photos"):
        store_photos(paths * 7, tmp_path / "a")
    broken = tmp_path / "x.png"
    broken.write_bytes(paths[0].read_bytes()[:100])
    with pytest.raises(RequestError, match="Photo 4 is not an image"):
        store_photos([*paths, broken], tmp_path / "a")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb)  # a few kB that would be 900 MB
    assert bomb.stat().st_size < 200_000
    with pytest.raises(RequestError, match="Photo 4"):
        store_photos([*paths, bomb], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    large = Image.new("RGB", (5000, 600), "red")
    large.info["exif"] = b"secret place"
    large.save(tmp_path / "large.jpg", comment=b"secret place")
    assert store_photos([*paths, tmp_path / "large.jpg"], tmp_path / "a") == 4
    stored = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in stored] == ["00.png", "01.png", "02.png", "03.png"]
    assert max(Image.open(stored[-1]).size) == 2048
    assert b"secret" not in stored[-1].read_bytes()


def test_captions_lie_beside_the_photos(photos, tmp_path) -> None:
    paths = sorted(photos.iterdir())
    words = ["a photo of sks dog at sea", *[""] * (len(paths) - 1)]
    store_photos(paths, tmp_path / "a", words)
    assert [path.name for path in sorted((tmp_path / "a").glob("*.txt"))] == ["00.txt"]
    assert (tmp_path / "a" / "00.txt").read_text() == words[0]


@pytest.mark.parametrize("captions", ["at sea", ["at sea"], {"0": "at sea"}])
def test_captions_are_as_many_as_photos(queue, photos, captions) -> None:
    with pytest.raises(RequestError, match="Captions must be a list with one for each of the 3 photos"):
        queue.submit(sorted(photos.iterdir()), "Waldo", "dog", 10, 100, None, captions)
