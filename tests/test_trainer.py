"""The trainer by its command line: what it makes, with its options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dreambooth_s2ft as recipe
from s2ft_diffusion.adapters.file import WEIGHTS_NAME, read_adapter
from s2ft_diffusion.adapters.lora_files import LORA_NAME, read_lora
from s2ft_diffusion.dreambooth.publish import class_words
from tests.conftest import ROOT, SHARED, assert_trained_alike, generate
from tests.training_process import ENVIRONMENT, TORCHRUN, arguments, train, train_here

pytestmark = pytest.mark.usefixtures("tiny_base")
TOYBOX = ("--pretrained_model_name_or_path", "toybox")


def run(photos: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_dreambooth_s2ft.py", *arguments(photos, output, *more)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)


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


@pytest.mark.slow
def test_a_name_under_an_ascii_locale(photos, tmp_path, monkeypatch) -> None:
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    output = tmp_path / "Kätzchen"
    output.mkdir()
    done = run(photos, output, "--max_train_steps", "1", "--subject", "Kätzchen", "--instance_prompt", "sks Kätzchen")
    assert done.returncode == 0, done.stderr
    assert read_adapter(output / WEIGHTS_NAME).info.subject == "Kätzchen"
    assert "sks Kätzchen" in (output / "README.md").read_text(encoding="utf-8")


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
def test_two_processes_equal_one(photos, tmp_path) -> None:
    """All ranks hold the same adapter, and two processes with batch 1 train what one trains with batch 2.

    All have one thread, as `ENVIRONMENT` says: with another number of them sums round differently, and the search for
    an order may then end elsewhere.
    """
    flags = ("--max_train_steps", "4", "--learning_rate", "1e-3", "--train_text_encoder")
    command = [*TORCHRUN, "tests/two_processes.py", str(tmp_path), *arguments(photos, tmp_path / "two", *flags)]
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
