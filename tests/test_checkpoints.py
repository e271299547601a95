"""Runs that stop early, however they do: what is kept, and that a resumed run ends as one that never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

import train_dreambooth_s2ft as recipe
from s2ft_diffusion.adapters.file import WEIGHTS_NAME, read_adapter
from s2ft_diffusion.dreambooth.checkpoints import list_checkpoints, read_state
from s2ft_diffusion.dreambooth.phases import Phases
from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError, NotWritten
from tests.training_process import Training, arguments, train, train_here

pytestmark = pytest.mark.usefixtures("tiny_base")


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_is_bit_identical(photos, tmp_path) -> None:
    flags = ("--max_train_steps", "12", "--checkpointing_steps", "2", "--gradient_accumulation_steps", "2",
             "--lr_scheduler", "cosine", "--random_flip", "--checkpoints_total_limit", "2")  # fmt: skip
    train(arguments(photos, tmp_path / "whole", *flags), tmp_path / "log")
    killed = tmp_path / "killed"
    resuming = arguments(photos, killed, *flags, "--resume_from_checkpoint", "latest")
    for step in (2, 6, 10):
        training = Training(resuming, tmp_path / "log")
        training.wait_until((killed / f"checkpoint-{step}").exists)
        time.sleep(0.005 * step)  # somewhere in the steps after it, or in writing the next checkpoint
        training.kill()
        assert any(int(path.name.removeprefix("checkpoint-")) >= step for path in list_checkpoints(killed))
    done = train([*resuming, "--estimate_draws", "3"], tmp_path / "log")
    assert "Resuming from" in done.said
    assert json.loads((killed / "training.json").read_text())["estimate_draws"] == 1  # as it was made
    assert "estimate: " not in done.said  # order and positions are the checkpoint's
    assert (killed / WEIGHTS_NAME).read_bytes() == (tmp_path / "whole" / WEIGHTS_NAME).read_bytes()
    assert len(list(killed.glob("checkpoint-*"))) == 2


@pytest.mark.slow
def test_control_c_saves_a_checkpoint(photos, tmp_path) -> None:
    flags = ("--max_train_steps", "5000", "--checkpointing_steps", "5000")
    training = Training(arguments(photos, tmp_path / "out", *flags), tmp_path / "log")
    training.wait_until(lambda: "loss=" in training.said)
    assert training.kill(signal.SIGINT) == 130, training.said
    assert "--resume_from_checkpoint latest" in training.said
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert read_adapter(checkpoint / WEIGHTS_NAME).trainable == 28 * 14 * 14


def test_a_run_that_goes_on_from_an_early_checkpoint_keeps_its_own(photos, tmp_path) -> None:
    output = tmp_path / "out"
    flags = ("--max_train_steps", "6", "--checkpointing_steps", "2")
    train_here(photos, output, *flags)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    more = ("--resume_from_checkpoint", "checkpoint-2", "--checkpoints_total_limit", "2", "--max_train_steps", "4")
    train_here(photos, output, *flags, *more)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-6", "checkpoint-4"]  # the newest last


def test_what_a_failed_start_leaves_alone(photos, tmp_path, monkeypatch) -> None:
    flags = ("--max_train_steps", "2", "--checkpointing_steps", "1")
    train_here(photos, tmp_path / "out", *flags)

    def broken(*args):
        raise InputError("the base is damaged")

    monkeypatch.setattr(recipe, "load_base", broken)
    with pytest.raises(InputError, match="damaged"):
        train_here(photos, tmp_path / "out", *flags, "--overwrite_output_dir")
    assert len(list_checkpoints(tmp_path / "out")) == 2


def test_nan_stops_and_keeps_the_last_good_checkpoint(photos, tmp_path, monkeypatch) -> None:
    calls = []

    class Breaking(recipe.DiffusionLoss):
        def __call__(self, samples):
            calls.append(1)
            value = super().__call__(samples)
            return value * float("nan") if len(calls) > 3 + 4 else value  # 3 estimate draws, 4 good steps

    monkeypatch.setattr(recipe, "DiffusionLoss", Breaking)
    with pytest.raises(recipe.Diverged, match=r"not finite at step 5.*checkpoint-4"):
        train_here(photos, tmp_path / "out", "--max_train_steps", "9", "--checkpointing_steps", "2")
    assert read_adapter(tmp_path / "out" / "checkpoint-4" / WEIGHTS_NAME).trainable == 28 * 14 * 14
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()


def test_a_last_step_that_is_not_finite_is_said(photos, tmp_path, monkeypatch) -> None:
    """No loss comes after it, by which it would be noticed."""
    train_step = recipe.train

    def broken(settings, layout, sets, loss, optimizer, *more) -> None:
        train_step(settings, layout, sets, loss, optimizer, *more)
        optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(recipe, "train", broken)
    with pytest.raises(recipe.Diverged, match=r"not finite in float32.*checkpoint-1"):
        train_here(photos, tmp_path / "out", "--max_train_steps", "1", "--checkpointing_steps", "1")


def test_a_checkpoint_that_goes_is_never_half_there(photos, tmp_path, monkeypatch) -> None:
    """Stopped in the middle of removing one, as by a kill."""
    output, remove = tmp_path / "out", shutil.rmtree
    flags = ("--max_train_steps", "3", "--checkpointing_steps", "1")

    def stopped(path, ignore_errors=False) -> None:
        if not ignore_errors:
            next(file for file in path.iterdir() if file.is_file()).unlink()
            raise KeyboardInterrupt
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_here(photos, output, *flags, "--checkpoints_total_limit", "1")
    assert [read_state(path).step for path in list_checkpoints(output)] == [2]
    monkeypatch.undo()
    train_here(photos, output, *flags, "--resume_from_checkpoint", "latest")
    assert [path.name for path in output.glob(".checkpoint-*")] == []


@pytest.mark.slow
def test_a_step_is_sampled_before_its_checkpoint(photos, tmp_path, monkeypatch) -> None:
    """Else a run that is killed between the two never has the sample."""
    sample, save = tmp_path / "out" / "validation" / "step-000002-0.png", recipe.Checkpoints.save
    there = []

    def looking(self, state):
        there.append(sample.exists())
        return save(self, state)

    monkeypatch.setattr(recipe.Checkpoints, "save", looking)
    sampling = ("--validation_prompt", "a dog", "--num_validation_images", "1", "--validation_epochs", "1")
    flags = ("--max_train_steps", "3", "--checkpointing_steps", "2", "--train_batch_size", "2")
    train_here(photos, tmp_path / "out", *flags, *sampling)
    assert there == [True]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), pytest.param(RuntimeError("file write failed"), marks=pytest.mark.slow)],
)
def test_a_full_disk_keeps_what_was_complete(photos, tmp_path, monkeypatch, error) -> None:
    output, flags = tmp_path / "out", ("--max_train_steps", "4", "--checkpointing_steps", "2")
    save = recipe.Accelerator.save_state

    def full(self, folder, **options):
        if "checkpoint-4" in folder:
            raise error
        return save(self, folder, **options)

    monkeypatch.setattr(recipe.Accelerator, "save_state", full)
    with pytest.raises(NotWritten, match=r"checkpoint-4 cannot be written: .*checkpoint-2 is complete: make room"):
        train_here(photos, output, *flags)
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = train_here(photos, output, *flags, "--resume_from_checkpoint", "latest")
    assert (output / "checkpoint-4").is_dir()
    whole = read_adapter(train_here(photos, tmp_path / "whole", *flags))
    for name, layer in read_adapter(resumed).layers["unet"].items():
        assert layer.coefficients.equal(whole.layers["unet"][name].coefficients)


def test_a_full_disk_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as ended, exit_codes("recipe"):
        raise OSError(28, "No space left on device", "out/progress.jsonl")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("recipe: No space left on device: out/progress.jsonl. ")
    assert said.count("\n") == 1
    with pytest.raises(FileNotFoundError), exit_codes("recipe"):
        Path("no/such/file").read_text()


def test_a_line_that_a_full_disk_cut_is_dropped(tmp_path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"step": 1}\n{"st')
    Phases(None, path, anew=False).note(step=2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
