"""`python -m eval score`: from an adapter's file to a table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("open_clip")

from eval import generation
from eval.__main__ import main
from eval.generation import image_path
from eval.prompts import Prompt, check_all_read, read_classes, read_templates
from eval.scores import Scores, contact_sheet, markdown
from s2ft_diffusion import toybox
from s2ft_diffusion.adapters.file import read_adapter, write_adapter
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.toybox.subjects import write_photos
from tests.training_process import TORCHRUN

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "app" / "adapters" / "widget.safetensors"
DREAMBENCH = ROOT.parent / "shared" / "dreambooth" / "prompts_and_classes.txt"


def test_the_unique_token_is_taken_out_for_clip() -> None:
    assert Prompt.fill("a {0} {1} in the snow", "sks", "dog") == Prompt("a sks dog in the snow", "a dog in the snow")
    assert Prompt.fill("a photo of sks dog", "sks", "dog") == Prompt("a photo of sks dog", "a photo of dog")


def test_names_and_classes_of_several_words(tmp_path) -> None:
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text("\ufeff" + DISTRIBUTED.replace("dog,dog", "my-dog, dog\nold teapot,teapot"), encoding="utf-8")
    assert read_classes(path) == {"my-dog": "dog", "old teapot": "teapot"}


def test_plain_lists(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\na {0}\n", encoding="utf-8-sig")
    assert read_templates(path, "dog") == ["a {0}"]
    path.write_text("# mine\na {0} {1}\n\n  a {0} {1} on Mars \n")
    assert read_templates(path, "dog") == ["a {0} {1}", "a {0} {1} on Mars"]
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="no prompts"):
        read_templates(path, "dog")
    with pytest.raises(InputError, match="cannot be read"):
        read_templates(tmp_path / "none.txt", "dog")


DISTRIBUTED = """Classes

subject_name,class
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def test_dreambench_as_distributed(tmp_path) -> None:
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(DISTRIBUTED)
    assert read_templates(path, "vase") == ["a {0} {1} in the jungle", "a cube shaped {0} {1}"]
    assert read_templates(path, "dog") == ["a {0} {1} wearing a red hat"]
    path.write_text(DISTRIBUTED.partition("Live")[0])
    with pytest.raises(InputError, match="no 'live subject' prompts"):
        read_templates(path, "dog")


@pytest.mark.skipif(not DREAMBENCH.exists(), reason="DreamBench's prompts are not here")
def test_the_real_dreambench_file() -> None:
    for class_name in ("backpack", "dog"):
        templates = read_templates(DREAMBENCH, class_name)
        assert len(templates) == 25
        assert all("{0} {1}" in template for template in templates)


def arguments(folder: Path) -> list[str]:
    photos, prompts = folder / "photos", folder / "prompts.txt"
    if not photos.exists():
        write_photos("widget", photos)
        prompts.write_text("a photo of {0} {1} in the snow\na photo of {0} {1} on the beach\n")
    return [
        "score", "--adapter", str(ADAPTER), "--subject_dir", str(photos), "--prompts", str(prompts), "--steps", "2",
        "--images_per_prompt", "2", "--output_dir", str(folder / "out"), "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.slow
def test_scores_an_adapter_and_goes_on_where_it_stopped(tmp_path, capsys) -> None:
    assert main(arguments(tmp_path)) == 0
    out = tmp_path / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["rows"]) == ["real photos", "widget"]
    row = scores["rows"]["widget"]
    assert all(isinstance(value, float) for value in row.values())
    assert scores["rows"]["real photos"]["clip_t"] is None
    assert 0.5 < scores["rows"]["real photos"]["dino"] <= 1
    assert row["drift_lpips"] > 0
    assert scores["images"] == 4
    table = (out / "scores.md").read_text()
    assert "toybox (unweighted" in table  # what stands in for the usual LPIPS is said
    assert table.strip() in capsys.readouterr().out
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > sheet.height  # six photos in the first row, two images in each further one
    made = sorted((out / "adapter").rglob("*.png"))
    assert len(made) == 2 * 2 + 8 * 2
    times = {path: path.stat().st_mtime_ns for path in made}
    lost = image_path(out / "adapter", "a photo of sks robot in the snow", 1)
    before = lost.read_bytes()
    lost.unlink()
    assert main(arguments(tmp_path)) == 0
    assert lost.read_bytes() == before
    assert [path for path in made if path.stat().st_mtime_ns != times[path]] == [lost]
    assert json.loads((out / "scores.json").read_text()) == scores
    assert main([*arguments(tmp_path), "--steps", "3"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    options = arguments(tmp_path)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main([*options, "--output_dir", str(alone)]) == 0
    command = [*TORCHRUN, "-m", "tests.two_evaluations"]
    command += [str(tmp_path), *options, "--output_dir", str(shared)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert (shared / "scores.json").read_text() == (alone / "scores.json").read_text()
    made = [int((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert sum(made) == 2 * 2 + 2 * 8 * 2
    assert abs(made[0] - made[1]) <= 3


class OneOfTwo:
    """`PartialState` of one of two processes, which here are threads; the second begins once the first waits."""

    barrier, first_waits, own = threading.Barrier(2), threading.Event(), threading.local()

    def __init__(self) -> None:
        self.rank = self.own.rank

    def wait_for_everyone(self) -> None:
        self.first_waits.set()
        self.barrier.wait(timeout=600)

    @contextmanager
    def split_between_processes(self, items: list) -> Iterator[list]:
        yield items[self.rank :: 2]


def test_a_slow_process_and_a_fast_one_make_all_images(tmp_path, monkeypatch) -> None:
    """One that lists what is missing while the other makes its share would take shares of another list."""

    def make_images(pipe, folder, wanted, *rest) -> None:
        for prompt, seed in wanted:
            image_path(folder, prompt, seed).parent.mkdir(parents=True, exist_ok=True)
            image_path(folder, prompt, seed).touch()

    def work(rank: int) -> None:
        OneOfTwo.own.rank = rank
        if rank == 1:
            OneOfTwo.first_waits.wait(timeout=600)
        generation.generate(None, tmp_path, ["a", "b"], range(3), None, "")

    monkeypatch.setattr(generation, "PartialState", OneOfTwo)
    monkeypatch.setattr(generation, "make_images", make_images)
    threads = [threading.Thread(target=work, args=[rank]) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.rglob("*.png"))) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--adapter", "/no/such/file"], "no such file"),
        (["--subject_dir", "/no/such/folder"], "no such folder"),
        (["--prompts", "/no/such/prompts"], "cannot be read"),
        (["--images_per_prompt", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--guidance", "nan"], "finite number"),
        (["--resolution", "65"], "multiple of 8"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--dino", "no-such/vit"], "--dino"),
        (["--base", "/no/such/base"], "cannot be loaded"),
    ],
)
def test_refuses_what_cannot_work(tmp_path, capsys, change, said, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoders = [] if change[0] != "--base" else ["--dino", "toybox", "--clip", "toybox", "--lpips", "toybox"]
    assert main([*arguments(tmp_path), *change, *encoders]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()


def test_arguments_under_an_ascii_locale(tmp_path, capsys, monkeypatch) -> None:
    """Python then has the bytes of other letters as half surrogates: text is text again, a path stays as it is."""
    ran = []
    monkeypatch.setattr("eval.score.run", ran.append)
    name, latin = "K\udcc3\udca4tzchen", "caf\udce9"
    options = [*arguments(tmp_path), "--class_name", name, "--token", name, "--adapter", name, "--features", name]
    assert main(options) == 0
    (args,) = ran
    assert (args.class_name, args.token, args.adapter, str(args.features)) == ("Kätzchen", "Kätzchen", name, name)
    for flag in ("--class_name", "--subject_dir", "--output_dir", "--base"):
        assert main([*options, flag, latin]) == 2
        assert capsys.readouterr().err == f"eval score: {flag}: caf\\xe9 is not UTF-8; write it so, or rename it.\n"
    assert main(["compare", "--subjects", "perk", latin]) == 2
    assert "--subjects: caf\\xe9 is not UTF-8" in capsys.readouterr().err


def test_nothing_is_written_over_what_is_read(tmp_path, capsys) -> None:
    options = arguments(tmp_path)
    photos, out = tmp_path / "photos", tmp_path / "out"
    (tmp_path / "link").symlink_to(photos)
    base = tmp_path / "base"
    shutil.copytree(toybox.base_path(), base)
    before = sorted(tmp_path.rglob("*"))
    changes = {
        "--output_dir and --subject_dir are one folder": ["--output_dir", tmp_path / "link"],
        "--features and --subject_dir are one folder": ["--features", tmp_path / "link" / "x" / ".."],
        "--subject_dir lies in features/ of --output_dir": ["--subject_dir", out / "features" / "dog"],
        "--subject_dir lies in adapter/ of --output_dir": ["--subject_dir", out / "adapter" / "dog"],
        "--adapter lies in adapter/ of --output_dir": ["--adapter", out / "adapter" / "dog.safetensors"],
        "--output_dir lies in --base": ["--base", base, "--output_dir", base / "unet"],
        "--features lies in --base": ["--base", base, "--features", base],
        "--base lies in base/ of --output_dir": ["--base", base, "--output_dir", tmp_path],
    }
    for said, change in changes.items():
        assert main([*options, *map(str, change)]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    study = ["--subjects_dir", str(tmp_path), "--prompts", str(tmp_path / "classes.txt"), "--device", "cpu"]
    (tmp_path / "classes.txt").write_text("Classes\n\nsubject_name,class\nphotos,robot\ncells,dog\n\nPrompts\n")
    (tmp_path / "cells").mkdir()
    for command in ("compare", "ablation"):
        assert main([command, *study, "--features", str(tmp_path / "link")]) == 2
        assert "--features and the photos of photos are one folder" in capsys.readouterr().err
        assert main([command, *study, "--output_dir", str(tmp_path)]) == 2
        assert "the photos of cells lies in cells/ of --output_dir" in capsys.readouterr().err
        assert main([command, "--base", str(base), "--output_dir", str(base), "--device", "cpu"]) == 2
        assert "--output_dir lies in --base" in capsys.readouterr().err
    shutil.copy(ADAPTER, tmp_path / "mittens.safetensors")  # what the change of that subject would be kept as
    assert main(["spectrum", "--adapter", str(tmp_path / "mittens.safetensors"), "--output_dir", str(tmp_path)]) == 2
    assert "--output_dir and the folder of --adapter are one folder" in capsys.readouterr().err
    assert sorted(path for path in before if path.exists()) == before
    assert "settings.json" not in [path.name for path in tmp_path.iterdir()]


def test_prompts_whose_end_is_not_read(tmp_path, capsys, caplog) -> None:
    """The base's text encoder reads 32 tokens: a subject behind them is refused, other words are warned of."""
    options = arguments(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a {'very ' * 40}good photo of {{0}} {{1}}\n")
    assert main(options) == 2
    assert "good photo of sks robot' at its end would not be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()
    prompts.write_text("{0} {1} in the snow\n")
    assert main([*options, "--token", "very " * 40 + "sks"]) == 2
    check_all_read("toybox", ["sks cat " + "very " * 40 + "happy"], "sks cat")
    (record,) = caplog.records
    assert record.getMessage().endswith("happy' at its end would not be read.")


def test_prompts_of_any_script_have_images_of_their_own(tmp_path) -> None:
    prompts = ["{0} {1} 在沙滩上", "{0} {1} 在雪地里", "Кот", "a " * 50 + "one", "a " * 50 + "other"]
    assert len({image_path(tmp_path, prompt, 0) for prompt in prompts}) == len(prompts)


@pytest.mark.slow
def test_an_adapter_for_another_base_is_refused_before_an_image_is_made(tmp_path, capsys) -> None:
    adapter = read_adapter(ADAPTER)
    for facts in (adapter.layers, adapter.kernels):
        facts["unet"] = {f"elsewhere.{name}": fact for name, fact in facts["unet"].items()}
    write_adapter(tmp_path / "other.safetensors", adapter)
    assert main([*arguments(tmp_path), "--adapter", str(tmp_path / "other.safetensors")]) == 2
    assert "no linear layer or convolution there" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_table_without_a_number_shows_a_dash() -> None:
    assert "| one | 0.500 | – | – | – | – | – |" in markdown({"one": Scores(dino=0.5)}, {"dino": "x"})


def test_contact_sheet_of_uneven_rows(tmp_path) -> None:
    rows = [[Image.new("RGB", (40, 20), "red")] * 3, [Image.new("RGB", (10, 30), "blue")]]
    contact_sheet(rows, tmp_path / "sheet.png", side=16)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 20 + 4, 2 * 20 + 4)
        assert sheet.getpixel((10, 30)) == (0, 0, 255)
