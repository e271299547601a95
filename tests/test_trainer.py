"""The trainer by its command line, on the embedded base."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_dreambooth_s2ft as recipe
from s2ft_diffusion.adapters.file import WEIGHTS_NAME, read_adapter
from s2ft_diffusion.adapters.lora_files import LORA_NAME, read_lora
from s2ft_diffusion.dreambooth.arguments import build_parser, parse_arguments
from s2ft_diffusion.dreambooth.checkpoints import list_checkpoints
from s2ft_diffusion.dreambooth.errors import InputError
from s2ft_diffusion.dreambooth.prompts import check_prompts, lost_words, read_windows
from s2ft_diffusion.dreambooth.publish import class_words
from tests.conftest import ROOT, SHARED, assert_trained_alike, generate
from tests.training_process import ENVIRONMENT, Training, train

BASE = "toybox"
TOYBOX = ("--pretrained_model_name_or_path", "toybox")


@pytest.fixture(scope="module", autouse=True)
def _base(tiny_base) -> None:
    """Runs start from the tiny base unless a test says another one."""
    global BASE
    BASE = str(tiny_base)


def arguments(photos: Path, output: Path, *more: str) -> list[str]:
    return [
        "--pretrained_model_name_or_path", BASE, "--instance_dir", str(photos), "--output_dir", str(output),
        "--targets", "qv", "--n_frequency", "200", "--estimate_draws", "1", "--report_to", "none", *more,
    ]  # fmt: skip


def run(photos: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_dreambooth_s2ft.py", *arguments(photos, output, *more)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)


def train_here(photos: Path, output: Path, *more: str) -> Path:
    """Run the recipe in this process; returns the adapter's path."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()
    recipe.main(arguments(photos, output, *more))
    return output / WEIGHTS_NAME


@pytest.mark.slow
def test_end_to_end(photos, tmp_path, toybox_pipe) -> None:
    output, pipe = tmp_path / "out", toybox_pipe
    training = (*TOYBOX, "--max_train_steps", "20", "--learning_rate", "1e-2")
    validation = (
        "--validation_prompt",
        "a photo of sks dog",
        "--num_validation_images",
        "1",
        "--validation_epochs",
        "4",
    )
    done = run(photos, output, *training, *validation)
    assert done.returncode == 0, done.stderr
    for line in ("'a photo of sks my dog'", "load: ", "estimate: ", "rearrange: ", "train: 20 steps", "validate: ",
                 "save: ", "pipe.load_s2ft_weights("):  # fmt: skip
        assert line in done.stdout
    adapter = read_adapter(output / WEIGHTS_NAME)
    assert adapter.trainable == 28 * 14 * 14
    assert adapter.info.instance_prompt == "a photo of sks my dog"
    assert adapter.info.date == "2023-11-14"
    assert (adapter.info.subject, adapter.info.class_name) == ("my dog", "my dog")
    assert adapter.info.thumbnail is not None
    report = json.loads((output / "training.json").read_text())
    assert report["adapter_bytes"] == (output / WEIGHTS_NAME).stat().st_size
    assert report["share"] == adapter.trainable / sum(p.numel() for p in pipe.unet.parameters())
    assert report["loss_last"] < report["loss_first"]
    assert sorted(p.name for p in (output / "validation").iterdir()) == ["final-0.png", "step-000012.png".replace(
        ".png", "-0.png")]  # fmt: skip
    events = [json.loads(line) for line in (output / "progress.jsonl").read_text().splitlines()]
    assert [e["phase"] for e in events if "summary" in e] == [*report["seconds"], "save"]
    steps = [e for e in events if "step" in e]
    assert [e["step"] for e in steps] == list(range(1, 21))
    assert {e["lr"] for e in steps} == {0.01}
    assert [e["images"] for e in events if "images" in e] == [
        [str(output / "validation" / f"{name}-0.png")] for name in ("step-000012", "final")
    ]
    assert "instance_prompt: a photo of sks my dog" in (output / "README.md").read_text()
    base = generate(pipe)
    snippet = done.stdout.split("Load it with:\n")[1].split("\nsave: ")[0]
    scope: dict = {}
    assert snippet.count("\n") == 2
    exec(snippet, scope)
    assert not torch.equal(generate(scope["pipe"]), base)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (("a photo of a dog", "a photo of sks rex"), "dog"),
        ((None, "a photo of sks dog"), "dog"),
        ((None, "a photo of my dog"), ""),
    ],
)
def test_words_of_the_class(prompts, words) -> None:
    assert class_words(*prompts) == words


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


@pytest.mark.slow
def test_two_processes_equal_one(photos, tmp_path) -> None:
    """All ranks hold the same adapter, and two processes with batch 1 train what one trains with batch 2.

    All have one thread, as `ENVIRONMENT` says: with another number of them sums round differently, and the search for
    an order may then end elsewhere.
    """
    flags = ("--max_train_steps", "4", "--learning_rate", "1e-3", "--train_text_encoder")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "tests/two_processes.py",
               str(tmp_path), *arguments(photos, tmp_path / "two", *flags)]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank0").read_bytes() == (tmp_path / "rank1").read_bytes()
    train(arguments(photos, tmp_path / "one", *flags, "--train_batch_size", "2"), tmp_path / "log")
    one, two = (read_adapter(tmp_path / name / WEIGHTS_NAME) for name in ("one", "two"))
    assert set(one.layers) == {"unet", "text_encoder"}
    assert_trained_alike(two, one)
    losses = [
        [e["loss"] for e in map(json.loads, (tmp_path / name / "progress.jsonl").open()) if "loss" in e]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_prior_preservation(photos, tmp_path) -> None:
    classes = tmp_path / "classes"
    more = ("--max_train_steps", "2", "--with_prior_preservation", "--class_data_dir", str(classes), "--class_prompt",
            "a photo of a dog", "--num_class_images", "3", "--sample_batch_size", "2")  # fmt: skip
    with_classes = read_adapter(train_here(photos, tmp_path / "a", *more))
    names = sorted(p.name for p in classes.iterdir())
    assert names == ["class-00000.png", "class-00001.png", "class-00002.png"]
    stamps = [p.stat().st_mtime_ns for p in sorted(classes.iterdir())]
    (classes / names[1]).unlink()
    train_here(photos, tmp_path / "b", *more)  # only what is missing is made
    assert [p.stat().st_mtime_ns for p in sorted(classes.iterdir())][::2] == stamps[::2]
    without = read_adapter(train_here(photos, tmp_path / "c", "--max_train_steps", "2"))
    for name, layer in without.layers["unet"].items():
        other = with_classes.layers["unet"][name]
        assert torch.equal(layer.row_functions, other.row_functions)  # the prior uses instance images only
    assert any(
        not torch.equal(layer.coefficients, with_classes.layers["unet"][name].coefficients)
        for name, layer in without.layers["unet"].items()
    )


@pytest.mark.parametrize(
    "more",
    [
        ("--preset", "paper"),
        ("--estimate", "full", "--estimate_draws", "2"),
        ("--mixed_precision", "bf16", "--gradient_checkpointing"),
        ("--targets", "blocks", "--train_text_encoder", "--n_frequency", "0.01"),
        ("--snr_gamma", "5.0", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"),
        ("--targets", "attention", "--adapter_dtype", "float16", "--rearrange", "none", "--sampling", "low_frequency"),
        (
            "--n_frequency",
            "0.02",
            "--signs",
            "no",
            "--refine",
            "none",
            "--distance",
            "euclidean",
            "--positions",
            "free",
            "--coefficients",
            "real",
        ),
        ("--targets", "all", "--n_frequency", "0.005"),
        ("--gradient_checkpointing", "--train_text_encoder"),
        ("--num_train_epochs", "1", "--scale_lr", "--center_crop", "--resolution", "32"),
    ],
    ids=lambda more: more[0].strip("-") + "-" + more[1],
)
def test_options_run(photos, tmp_path, more) -> None:
    steps = () if "--num_train_epochs" in more else ("--max_train_steps", "2")
    adapter = read_adapter(train_here(photos, tmp_path / "out", *steps, *more))
    assert any(bool(layer.coefficients.any()) for layer in adapter.layers["unet"].values())


@pytest.mark.slow
def test_8_bit_adam(photos, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    files = [
        read_adapter(
            train_here(photos, tmp_path / name, *TOYBOX, "--max_train_steps", "2", "--n_frequency", "5000", *flags)
        )
        for name, flags in (("full", ()), ("eight", ("--use_8bit_adam",)))
    ]
    name, layer = next(iter(files[0].layers["unet"].items()))
    other = files[1].layers["unet"][name].coefficients
    assert not torch.equal(other, layer.coefficients)
    assert torch.cosine_similarity(other.flatten(), layer.coefficients.flatten(), dim=0) > 0.9


def test_same_seed_same_file_other_seed_other_file(photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    files = [
        train_here(photos, tmp_path / name, "--max_train_steps", "2", "--seed", seed).read_bytes()
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


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


def test_the_card_shows_the_samples_of_its_run(photos, tmp_path) -> None:
    output, sampling = tmp_path / "out", ("--validation_prompt", "a photo of sks dog", "--num_validation_images", "1")
    train_here(photos, output, "--max_train_steps", "1", *sampling)
    assert "final-0.png" in (output / "README.md").read_text()
    train_here(photos, output, "--max_train_steps", "1")
    assert "final-0.png" not in (output / "README.md").read_text()


def test_a_lora_beside_the_adapter(photos, tmp_path) -> None:
    output = tmp_path / "out"
    adapter = read_adapter(train_here(photos, output, "--max_train_steps", "2", "--save_lora"))
    lora = read_lora(output / LORA_NAME)
    for component, layers in adapter.layers.items():
        for name, layer in layers.items():
            wanted = layer.delta() * adapter.configs[component].scaling
            found = lora.layers[component][name].delta()
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3 * float(wanted.abs().max()))
    written = json.loads((output / "training.json").read_text())
    assert written["lora_bytes"] == (output / LORA_NAME).stat().st_size
    assert "load_lora_weights" in (output / "README.md").read_text()
    train_here(photos, output, "--max_train_steps", "1", "--overwrite_output_dir")
    assert not (output / LORA_NAME).exists()  # it was of another adapter
    assert "lora" not in (output / "README.md").read_text()


def test_the_subject_is_called_what_one_says(photos, tmp_path) -> None:
    info = read_adapter(train_here(photos, tmp_path / "out", "--max_train_steps", "1", "--subject=柴犬 R2-D2")).info
    assert (info.subject, info.instance_prompt) == ("柴犬 R2-D2", "a photo of sks 柴犬 R2-D2")


def test_gradient_checkpointing_reaches_the_text_encoder(photos, tmp_path, monkeypatch) -> None:
    before, encoders = recipe.add_adapters, []

    def keeping(components, plan, settings):
        encoders.append(components["text_encoder"])
        return before(components, plan, settings)

    monkeypatch.setattr(recipe, "add_adapters", keeping)
    more = ("--max_train_steps", "1", "--train_text_encoder", "--gradient_checkpointing")
    train_here(photos, tmp_path / "out", *more)
    assert encoders[0].is_gradient_checkpointing
    assert encoders[0].training  # in evaluation transformers does without


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


# Bad input -----------------------------------------------------------------------------------------------------------


def bad(photos: Path, output: Path, *more: str) -> str:
    """The message with which the recipe refuses, before it loads a model."""
    loaded = []
    before = recipe.load_base
    recipe.load_base = lambda *args: loaded.append(1)
    try:
        with pytest.raises(InputError) as caught:
            train_here(photos, output, *more)
    finally:
        recipe.load_base = before
    assert not loaded
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line_and_exit_code_two(photos, tmp_path) -> None:
    for folder, *flags in ((tmp_path / "nothing",), (tmp_path,), (photos, "--no_such_flag")):
        training = Training(arguments(folder, tmp_path / "out", *flags), tmp_path / "log")
        assert training.wait() == 2
        assert training.said.splitlines()[-1].startswith("train_dreambooth_s2ft.py: error: ")
        assert training.said.count("error: ") == 1
        assert "Traceback" not in training.said


def test_refuses_images(photos, tmp_path) -> None:
    classes = tmp_path / "classes"
    classes.mkdir()
    (classes / "notes.txt").write_text("not an image")
    more = ("--with_prior_preservation", "--class_data_dir", str(classes), "--class_prompt", "a dog")
    assert "notes.txt" in bad(photos, tmp_path / "out", *more)
    (photos / "9.jpg").write_bytes(b"not an image")
    assert "9.jpg" in bad(photos, tmp_path / "out")


def test_refuses_output_folders(photos, tmp_path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in bad(photos, tmp_path / "file" / "out")
    train_here(photos, tmp_path / "out", "--max_train_steps", "1", "--checkpointing_steps", "1")
    message = bad(photos, tmp_path / "out", "--max_train_steps", "2")
    assert "--resume_from_checkpoint latest" in message
    assert "--overwrite_output_dir" in message
    more = ("--resume_from_checkpoint", "latest", "--seed", "5", "--n_frequency", "100")
    assert "--seed 5 (was 0)" in bad(photos, tmp_path / "out", *more)
    two = ("--resume_from_checkpoint", "latest", "--max_train_steps", "2")
    train_here(photos, tmp_path / "two", "--max_train_steps", "2", "--checkpointing_steps", "2")
    assert "after step 2" in bad(photos, tmp_path / "two", *two[:-1], "1")
    (photos / "0.png").write_bytes((photos / "1.png").read_bytes())  # another photo under the same name
    assert "other photos: 0.png differ" in bad(photos, tmp_path / "two", *two)
    (tmp_path / "two" / "checkpoint-2" / "optimizer.bin").unlink()
    (tmp_path / "two" / "checkpoint-2" / "training_state.json").write_text("{")
    assert "damaged" in bad(photos, tmp_path / "two", *two)
    assert "no checkpoint" in bad(photos, tmp_path / "out", "--resume_from_checkpoint", "checkpoint-77")
    train_here(photos, tmp_path / "out", "--max_train_steps", "1", "--overwrite_output_dir")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--n_frequency", "40000"), "unet."),
        (("--tokenizer_max_length", "100"), "more than the 32 tokens that the base's text_encoder reads"),
        (("--instance_prompt", "a photo of " + 40 * "very " + "good sks dog"), "sks dog' at its end would not be read"),
        (("--validation_prompt", 40 * "very " + "sks"), "--validation_prompt is too long"),
        (("--resolution", "61"), "multiple of 4"),
        (("--pretrained_model_name_or_path", "/no/such/folder"), "toybox"),
        (("--pretrained_model_name_or_path", "someone/no-such-model"), "--pretrained_model_name_or_path FOLDER"),
        (("--with_prior_preservation",), "--class_data_dir"),
        (("--class_prompt", "a dog"), "--with_prior_preservation"),
        (("--train_text_encoder", "--pre_compute_text_embeddings"), "contradict"),
        (("--resume_from_checkpoint", "latest", "--overwrite_output_dir"), "contradict"),
        (("--max_train_steps", "5", "--num_train_epochs", "2"), "contradict"),
        (("--max_train_steps", "0"), "at least 1"),
        (("--learning_rate", "-1"), "above 0"),
        (("--adam_beta2", "1.0"), "adam_beta2"),
        (("--adam_weight_decay", "-1"), "negative"),
        (("--adam_epsilon", "0"), "above 0"),
        (("--snr_gamma", "0"), "above 0"),
        (("--lr_scheduler", "polynomial", "--learning_rate", "1e-8"), "polynomial"),
        (("--push_to_hub", "--hub_model_id", "my dog"), "--hub_model_id"),
        (("--mixed_precision", "fp16"), "bf16"),
        (("--report_to", "carrier_pigeon"), "report_to"),
        (("--n_frequency", "1.5"), "n_frequency"),
        (("--save_lora", "-1"), "rank of at least 1"),
        (("--preset", "paper", "--save_lora"), "positions are free"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_refuses_flags(photos, tmp_path, more, match) -> None:
    assert match in bad(photos, tmp_path / "out", *more)


@pytest.mark.parametrize(
    ("flag", "package"),
    [("use_8bit_adam", "bitsandbytes"), ("enable_xformers_memory_efficient_attention", "xformers")],
)
def test_refuses_what_is_not_installed(photos, tmp_path, monkeypatch, flag, package) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == package else installed(n, *a))
    assert f"pip install {package}" in bad(photos, tmp_path / "out", f"--{flag}")


def test_the_default_base_is_named_with_the_ways_out(photos, tmp_path) -> None:
    command = ["--instance_dir", str(photos), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="toybox") as caught:
        recipe.main(command)
    assert "stable-diffusion-v1-5" in str(caught.value)


def test_diffusers_spelling_of_the_folder(photos) -> None:
    assert parse_arguments(["--instance_data_dir", str(photos)]).photos.folder == photos
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    theirs = """instance_data_dir class_data_dir instance_prompt class_prompt validation_prompt num_validation_images
    validation_epochs with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop
    train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay
    adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision
    prior_generation_precision enable_xformers_memory_efficient_attention pre_compute_text_embeddings
    tokenizer_max_length pretrained_model_name_or_path revision variant""".split()
    assert {f"--{name}" for name in theirs} <= flags


@pytest.mark.skipif(not (SHARED / "dreambooth" / "cat").is_dir(), reason="needs the real photos beside the project")
@pytest.mark.slow
def test_real_photos(tmp_path, toybox_pipe) -> None:
    output, pipe = tmp_path / "cat", toybox_pipe
    path = train_here(
        SHARED / "dreambooth" / "cat",
        output,
        "--max_train_steps",
        "40",
        "--train_batch_size",
        "4",
        "--learning_rate",
        "1e-2",
        *TOYBOX,
    )
    report = json.loads((output / "training.json").read_text())
    assert report["loss_last"] < report["loss_first"]
    base = generate(pipe)
    pipe.load_s2ft_weights(path)
    assert not torch.equal(generate(pipe), base)


def test_words_that_are_lost_are_said(photos, tmp_path, tiny_base, caplog) -> None:
    settings = parse_arguments(
        [*arguments(photos, tmp_path), "--instance_prompt", "a photo of sks dog",
         "--validation_prompt", "sks dog " + 40 * "very " + "happy"]
    )  # fmt: skip
    windows = read_windows(settings.base)
    assert [window for _, window in windows] == [32]
    assert lost_words("a photo of sks dog", windows) == ""
    assert lost_words("sks dog " + 40 * "very " + "happy", windows).endswith("happy")
    check_prompts(settings)
    assert "--validation_prompt is too long" in caplog.text
