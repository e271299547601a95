"""What the trainer refuses, in one line and before a model is loaded, and what it warns of."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_dreambooth_s2ft as recipe
from s2ft_diffusion.adapters.lora_files import LORA_NAME
from s2ft_diffusion.dreambooth.arguments import build_parser, parse_arguments
from s2ft_diffusion.dreambooth.prompts import check_prompts, loses_subject, lost_words, read_windows
from s2ft_diffusion.errors import InputError
from tests.training_process import Training, arguments, train_here

pytestmark = pytest.mark.usefixtures("tiny_base")


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
    for folder, *flags in ((tmp_path / "nothing",), (photos, "--no_such_flag")):
        training = Training(arguments(folder, tmp_path / "out", *flags), tmp_path / "log")
        assert training.wait() == 2
        assert training.said.splitlines()[-1].startswith("train_dreambooth_s2ft.py: error: ")
        assert training.said.count("error: ") == 1
        assert "Traceback" not in training.said


def test_refuses_images(photos, tmp_path) -> None:
    classes = tmp_path / "classes"
    classes.mkdir()
    assert "there are no images in it" in bad(classes, tmp_path / "out")
    (classes / "notes.txt").write_text("not an image")
    more = ("--with_prior_preservation", "--class_data_dir", str(classes), "--class_prompt", "a dog")
    assert "notes.txt" in bad(photos, tmp_path / "out", *more)
    (photos / "9.jpg").write_bytes(b"not an image")
    assert "9.jpg" in bad(photos, tmp_path / "out")


@pytest.mark.slow
def test_what_is_not_ours_is_not_written_over(photos, tmp_path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("# My project")
    assert "README.md is no card of this program" in bad(photos, output)
    (output / "README.md").unlink()
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, output / LORA_NAME)
    assert f"{LORA_NAME} is no LoRA of this program" in bad(photos, output, "--save_lora")
    before = (output / LORA_NAME).read_bytes()
    (output / "validation").mkdir()
    (output / "validation" / "final-holiday.png").write_bytes(b"x")
    sampling = ("--validation_prompt", "a photo of sks dog", "--num_validation_images", "1")
    for more in ((), sampling):  # over its own card, too
        train_here(photos, output, "--max_train_steps", "1", *more)
    assert (output / LORA_NAME).read_bytes() == before
    names = ["final-0.png", "final-holiday.png"]
    assert sorted(path.name for path in (output / "validation").glob("final-*")) == names


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
        (("--instance_prompt", 28 * "very " + "sks mitten"), "would not be read"),  # not even "sks" whole
        (("--instance_prompt", 40 * "very " + "\N{DOG FACE}"), "\N{DOG FACE}' at its end would not be read"),
        (("--instance_prompt", 9 * "very " + "\N{DOG FACE}"), "\N{DOG FACE}' at its end would not be read"),  # in part
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
        (("--lr_scheduler", "polynomial", "--lr_warmup_steps", "2", "--max_train_steps", "2"), "the run's 2 steps"),
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


def test_every_number_is_finite_and_in_its_range(photos, tmp_path) -> None:
    numbers = {action.dest for action in build_parser()._actions if action.type is float} | {"n_frequency"}
    assert len(numbers) > 15
    cases = [(name, value, "finite") for name in numbers - {"n_frequency"} for value in ("nan", "inf", "-inf", "1e400")]
    cases += [("n_frequency", "1e400", "finite"), ("scaling", "1e38", "at most"), ("lr_power", "0", "above 0")]
    cases += [("lr_warmup_steps", "-5", "negative"), ("prior_loss_weight", "-1", "negative")]
    cases += [("guidance_scale", "-1", "negative"), ("lr_num_cycles", "0", "at least 1")]
    for name, value, match in cases:
        with pytest.raises(InputError, match=f"^--{name} must .*{match}"):
            parse_arguments(arguments(photos, tmp_path, f"--{name}={value}"))


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
    assert lost_words(9 * "very " + "\N{DOG FACE}", windows) == "\N{DOG FACE}"  # of whose tokens one is read
    assert lost_words(14 * "sks dog " + "sks zebra", windows) == "zebra"  # of many tokens, the first of which are read
    assert not loses_subject("sks dog " + 40 * "very " + "dog", {"sks", "dog"}, windows)
    assert loses_subject("dog " + 40 * "very " + "sks", {"sks", "dog"}, windows)
    long = ["--with_prior_preservation", "--class_data_dir", str(tmp_path / "c"), "--class_prompt", "a " * 40 + "dog"]
    with pytest.raises(InputError, match="--class_prompt is too long"):
        check_prompts(parse_arguments([*arguments(photos, tmp_path), "--instance_prompt", "a photo of sks dog", *long]))
    with pytest.raises(InputError, match=r"The caption 'x x .* is too long"):
        check_prompts(settings, ["x " * 40 + "sks"])
