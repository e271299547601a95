"""What a run is given from outside: folders, bytes that are no text, accelerate's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from s2ft_diffusion.dreambooth.arguments import parse_arguments
from s2ft_diffusion.dreambooth.errors import InputError
from s2ft_diffusion.dreambooth.images import find_images, fingerprints, load_image
from s2ft_diffusion.dreambooth.process import make_accelerator
from s2ft_diffusion.dreambooth.text import decoded, printable
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
    parse(photos, photos / "out", *classes, str(photos / "classes"))  # sub-folders are ignored among photos


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
        "import sys; from s2ft_diffusion.dreambooth.text import decoded; "
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
    yield
    reset()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "says 2 gradient accumulation steps"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo backend INDUCTOR"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_TP", "1", "tensor parallelism"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "several dimensions"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "accelerate"),
    ],
)
def test_an_environment_that_contradicts_the_flags(photos, tmp_path, monkeypatch, fresh, name, value, match) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match) as caught:
        make_accelerator(parse(photos, tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_an_environment_that_says_the_same(photos, tmp_path, monkeypatch, fresh, caplog) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level("INFO"):
        accelerator = make_accelerator(parse(photos, tmp_path / "out", "--gradient_accumulation_steps", "2"))
    assert accelerator.gradient_accumulation_steps == 2
    assert "Mixed precision is bf16, by accelerate's configuration" in caplog.text
