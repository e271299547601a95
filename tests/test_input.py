"""What a run is given from outside: folders, bytes that are no text, accelerate's environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from s2ft_diffusion import toybox
from s2ft_diffusion.dreambooth.arguments import parse_arguments
from s2ft_diffusion.dreambooth.checkpoints import STATE_NAME, TrainingState, prepare_output_dir
from s2ft_diffusion.dreambooth.images import find_images, fingerprints, load_image
from s2ft_diffusion.dreambooth.process import make_accelerator
from s2ft_diffusion.dreambooth.settings import CheckpointSettings
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.text import decoded, printable
from tests.conftest import ROOT

LATIN = "caf\udce9"  # as Python has the bytes of "café" in Latin-1


def parse(photos: Path, output: Path, *more: str):
    return parse_arguments(["--instance_dir", str(photos), "--output_dir", str(output), "--report_to", "none", *more])


# Folders -------------------------------------------------------------------------------------------------------------


def test_folders_that_are_one(photos, tmp_path) -> None:
    (tmp_path / "link").symlink_to(photos)
    spellings = [photos, tmp_path / "link", photos / ".", photos / "sub" / "..", Path(os.path.relpath(photos))]
    classes = ("--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir")
    for same in spellings:
        with pytest.raises(InputError, match="--output_dir and --instance_dir are one folder"):
            parse(photos, same)
        with pytest.raises(InputError, match="--class_data_dir and --instance_dir are one folder"):
            parse(photos, tmp_path / "out", *classes, str(same))
    with pytest.raises(InputError, match="--output_dir and --class_data_dir are one folder"):
        parse(photos, tmp_path / "out", *classes, str(tmp_path / "out"))  # none of which exists yet
    with pytest.raises(InputError, match="sample images and --instance_dir are one folder"):
        parse(tmp_path / "out" / "validation", tmp_path / "out")
    with pytest.raises(InputError, match="--logging_dir and --instance_dir are one folder"):
        parse(photos, tmp_path / "out", "--logging_dir", str(photos))
    parse(photos, photos / "out", *classes, str(photos / "classes"))  # sub-folders are ignored among photos


def test_nothing_that_is_read_lies_among_checkpoints(photos, tmp_path) -> None:
    """They are replaced, and removed with --overwrite_output_dir."""
    output = tmp_path / "out"
    inside = output / "checkpoint-7" / "dog"
    inside.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    inside.symlink_to(tmp_path / "elsewhere")  # a link that would be removed
    (tmp_path / "link").symlink_to(output)
    classes = ("--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir")
    base = "--pretrained_model_name_or_path"
    places = (output / "checkpoint-2", output / ".checkpoint-2.tmp", inside, tmp_path / "link" / "checkpoint-7",
              output / "x" / ".." / "checkpoint-7" / "")  # fmt: skip
    for place in places:
        with pytest.raises(InputError, match="--instance_dir lies in the checkpoints of --output_dir"):
            parse(place, output, "--overwrite_output_dir")
        with pytest.raises(InputError, match="--class_data_dir lies in the checkpoints of --output_dir"):
            parse(photos, output, *classes, str(place), "--checkpointing_steps", "1")
        with pytest.raises(InputError, match="--pretrained_model_name_or_path lies in the checkpoints"):
            parse(photos, output, base, str(place))
    parse(output / "dog", output, *classes, str(output / "class"))
    parse(photos, output, "--resume_from_checkpoint", str(output / "checkpoint-7"))
    with pytest.raises(InputError, match="--output_dir and --resume_from_checkpoint are one folder"):
        parse(photos, output / "checkpoint-7", "--resume_from_checkpoint", str(output / "checkpoint-7"))


def test_nothing_is_written_into_the_base(photos, tmp_path) -> None:
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    flag = ("--pretrained_model_name_or_path", str(base))
    classes = ("--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir")
    for place in (base, base / "unet", base / "new", tmp_path / "link", tmp_path / "link" / "unet" / ".."):
        with pytest.raises(InputError, match="--output_dir lies in --pretrained_model_name_or_path"):
            parse(photos, place, *flag)
        with pytest.raises(InputError, match="--class_data_dir lies in --pretrained_model_name_or_path"):
            parse(photos, tmp_path / "out", *flag, *classes, str(place))
        with pytest.raises(InputError, match="--logging_dir lies in --pretrained_model_name_or_path"):
            parse(photos, tmp_path / "out", *flag, "--logging_dir", str(place))
    with pytest.raises(InputError, match="--output_dir lies in --pretrained_model_name_or_path"):
        parse(photos, toybox.base_path(), "--pretrained_model_name_or_path", "toybox")
    parse(photos, tmp_path / "base-dog", *flag)
    parse(photos, tmp_path, *flag)


# Bytes ---------------------------------------------------------------------------------------------------------------


def test_names_that_are_no_utf_8(photos) -> None:
    first = next(photos.iterdir())
    os.rename(first, os.fsencode(photos) + b"/caf\xe9.png")
    paths = find_images(photos)
    line = fingerprints(paths)
    assert r"caf\xe9.png" in line
    line.encode()  # for trackers and checkpoints
    broken = photos / f"{LATIN}.txt"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"caf\\xe9\.txt: not a readable image") as caught:
        load_image(broken)
    str(caught.value).encode()


@pytest.mark.parametrize("flag", ["--instance_prompt", "--subject", "--validation_prompt", "--output_dir"])
def test_arguments_that_are_no_utf_8(photos, tmp_path, flag) -> None:
    with pytest.raises(InputError, match=r"caf\\xe9 is not UTF-8"):
        parse(photos, tmp_path, flag, LATIN)


def test_a_token_is_not_shown(photos, tmp_path) -> None:
    with pytest.raises(InputError, match="--hub_token is not UTF-8") as caught:
        parse(photos, tmp_path, "--hub_token", LATIN)
    assert "caf" not in str(caught.value)


def test_a_folder_whose_name_is_no_utf_8(tmp_path) -> None:
    with pytest.raises(InputError, match=r"--instance_dir: \S*caf\\xe9 is not UTF-8"):
        parse(tmp_path / LATIN, tmp_path / "out")


def test_decoded_and_printable() -> None:
    assert decoded("Kätzchen 柴犬") == "Kätzchen 柴犬"
    with pytest.raises(UnicodeDecodeError):
        decoded(LATIN)
    assert printable(LATIN) == r"caf\xe9"
    assert printable("Kätzchen") == "Kätzchen"


def test_arguments_under_an_ascii_locale(tmp_path) -> None:
    code = (
        "import sys; from s2ft_diffusion.text import decoded; "
        "assert decoded(sys.argv[1]) == 'K\\u00e4tzchen', ascii(sys.argv)"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    # The package's __init__ would import torch; the function needs nothing of it.
    code = "import sys, types; sys.modules['s2ft_diffusion'] = m = types.ModuleType('s2ft_diffusion'); " + (
        f"m.__path__ = [{str(ROOT / 's2ft_diffusion')!r}]; " + code
    )
    subprocess.run([sys.executable, "-c", code, "Kätzchen"], env=environment, check=True)


# accelerate's environment --------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """accelerate keeps its state for a process's life."""

    def reset() -> None:
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        PartialState._reset_state()

    reset()
    yield reset
    reset()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "2",
            "is 2 in accelerate.s environment, --gradient_accumulation_steps is 1",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo backend INDUCTOR"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP 1; set fsdp_version to 2"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_TP", "1", "tensor parallelism"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "several dimensions"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "accelerate"),
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a whole number, got 'two'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be at least 1"),
        ("LOCAL_RANK", "first", "LOCAL_RANK must be a whole number"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:99", "accelerate cannot set up the run"),
        ("ACCELERATE_TORCH_DEVICE", "nonsense", "accelerate cannot set up the run"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "accelerate cannot set up the run"),
        ("ACCELERATE_USE_CPU", "bogus", "accelerate cannot set up the run"),
        ("ACCELERATE_DEBUG_MODE", "bogus", "accelerate cannot set up the run"),
    ],
)
def test_an_environment_that_contradicts_the_flags(photos, tmp_path, monkeypatch, fresh, name, value, match) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match) as caught:
        make_accelerator(parse(photos, tmp_path / "out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("FSDP_IGNORED_MODULES", "proj_out", "fsdp_ignored_modules, which are not left out"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true, .* use --offload"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use --gradient_checkpointing"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "use plain data parallelism"),
    ],
)
def test_fsdp_that_the_run_does_not_do(photos, tmp_path, monkeypatch, name, value, match) -> None:
    for variable, said in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", name: value}.items():
        monkeypatch.setenv(variable, said)
    with pytest.raises(InputError, match=match):
        parse(photos, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "zero_stage: 3, which shares out the base; use --shard"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "leave it out"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "a file of DeepSpeed's"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "--max_grad_norm is 1"),
    ],
)
def test_deepspeed_that_the_run_does_not_do(photos, tmp_path, monkeypatch, fresh, name, value, match) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        make_accelerator(parse(photos, tmp_path / "out"))


def test_what_accelerates_configuration_asks_for_is_what_the_run_says(
    photos, tmp_path, monkeypatch, fresh, caplog
) -> None:
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "none", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = parse(photos, tmp_path / "out")
    assert settings.compute.shard == 2
    assert settings.flags["estimate"] == "scaled"  # weights that are shared out are not trained for it
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parse(photos, tmp_path / "out").compute.shard == 1  # nobody to share with
    with caplog.at_level("INFO"):
        accelerator = make_accelerator(settings)
    assert accelerator.distributed_type == "NO"
    assert "several processes share out the base, by its blocks" in caplog.text
    assert "Plain data parallelism in the place of DeepSpeed" in caplog.text


@pytest.mark.parametrize("value", ["now", "1.5", "9" * 30, "-" + "9" * 18])
def test_a_date_that_is_none(photos, tmp_path, monkeypatch, value) -> None:
    """Read at the end, it would cost the training."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(InputError, match=f"SOURCE_DATE_EPOCH must be seconds since 1970, got '{value}'"):
        parse(photos, tmp_path / "out")


def test_the_precision_of_the_environment_is_the_runs(photos, tmp_path, monkeypatch) -> None:
    """Compared when a run is resumed, and refused where the flag would be."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "")
    assert parse(photos, tmp_path / "out").flags["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "BF16")
    settings = parse(photos, tmp_path / "out")
    assert settings.compute.mixed_precision == settings.flags["mixed_precision"] == "bf16"
    assert parse(photos, tmp_path / "out", "--mixed_precision", "no").flags["mixed_precision"] == "no"
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    state = TrainingState(step=1, flags=dict(settings.flags))
    (checkpoint / STATE_NAME).write_text(json.dumps(asdict(state)))
    resumed = CheckpointSettings(resume_from="latest")
    assert prepare_output_dir(tmp_path / "out", resumed, settings.flags) == checkpoint
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with pytest.raises(InputError, match=r"other flags: --mixed_precision no \(was bf16\)"):
        prepare_output_dir(tmp_path / "out", resumed, parse(photos, tmp_path / "out").flags)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(InputError, match="ACCELERATE_MIXED_PRECISION fp16 needs a GPU"):
        parse(photos, tmp_path / "out")
    with pytest.raises(InputError, match="--mixed_precision fp16 needs a GPU"):
        parse(photos, tmp_path / "out", "--mixed_precision", "fp16")


def test_an_empty_number_of_processes_is_one_that_is_not_set(photos, tmp_path, monkeypatch, fresh) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    settings = parse(photos, tmp_path / "out")
    assert settings.flags["processes"] == make_accelerator(settings).num_processes == 1


def test_one_run_leaves_the_next_nothing_to_contradict(photos, tmp_path, fresh) -> None:
    for steps in (2, 1):
        settings = parse(photos, tmp_path / "out", "--gradient_accumulation_steps", str(steps))
        assert make_accelerator(settings).gradient_accumulation_steps == steps
        fresh()


def test_an_environment_that_says_the_same(photos, tmp_path, monkeypatch, fresh, caplog) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level("INFO"):
        accelerator = make_accelerator(parse(photos, tmp_path / "out", "--gradient_accumulation_steps", "2"))
    assert accelerator.gradient_accumulation_steps == 2
    assert "Mixed precision is bf16." in caplog.text
