"""`python -m eval compare`: whole runs of the smallest size, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("open_clip")

from eval import cells, compare
from eval.__main__ import main
from eval.plots import plot_differences
from eval.protocol import made_quick, own_process
from eval.table import difference
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.toybox.subjects import write_photos
from tests import two_evaluations
from tests.training_process import TORCHRUN

ROOT = Path(__file__).resolve().parents[1]


def test_a_method_whose_trainings_all_failed_is_not_plotted(tmp_path) -> None:
    rows = [{"method": name, "title": name} for name in ("lora", "fourierft", "s2ft-default")]
    paired = [
        {"a": "lora", "b": "s2ft-default", "metric": metric, "mean": 0.1, "low": low, "high": 0.2}
        for metric, low in (("dino", 0.05), ("clip_i", None), ("drift", -0.1))
    ]
    plot_differences({"rows": rows, "paired": paired}, "s2ft-default", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert difference(paired, "s2ft-default", "lora", "dino") == {"mean": -0.1, "low": -0.2, "high": -0.05}
    assert difference(paired, "s2ft-default", "fourierft", "dino") is None


def test_ranks_that_are_no_numbers(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "")
    assert own_process("cpu") == (True, "cpu")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK must be a whole number, got 'first'"):
        own_process("cpu")


def test_quick_leaves_what_one_says() -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    args = parser.parse_args(["--quick", "--subjects", "dash", "--seeds", "3"])
    args = made_quick(args, compare.add_arguments, compare.QUICK)
    assert (args.subjects, args.seeds, args.steps) == (["dash"], 3, 60)
    assert "lora" in args.methods
    args = made_quick(parser.parse_args(["--methods", "full"]), compare.add_arguments, compare.QUICK)
    assert args.methods == ["full"]


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "compare", "--output_dir", str(folder), "--device", "cpu", "--methods", "lora", "s2ft-default",
        "--development", "perk", "--subjects", "mittens", "--trials", "1", "--seeds", "1", "--steps", "2",
        "--batch", "1", "--images_per_prompt", "2", "--drift_images", "1", "--sampling_steps", "1",
        "--targets", "qv", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        two_evaluations.small(patch.setattr)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A finished comparison of the smallest size."""
    folder = tmp_path_factory.mktemp("compare")
    assert main(arguments(folder)) == 0
    return folder


@pytest.mark.slow
def test_compare_writes_what_it_promises(compared) -> None:
    found = json.loads((compared / "compare.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["drawn", "base", "lora", "s2ft-default"]
    for row in found["rows"][2:]:
        assert set(row) >= {"trainable", "share", "bytes", "seconds", "peak_mb"}
        for metric in ("dino", "clip_i", "clip_t", "lpips", "drift", "held_out"):
            assert set(row[metric]) == {"mean", "stderr"}
        assert 0 < row["share"] < 0.03
    drawn, base = found["rows"][:2]
    assert base["drift"]["mean"] == 0
    assert drawn["drift"] is drawn["trainable"] is drawn["held_out"] is None
    for metric in ("dino", "clip_i"):  # nothing is as much like a subject as itself
        assert drawn[metric]["mean"] > max(row[metric]["mean"] for row in found["rows"][1:])
    assert {(p["a"], p["b"]) for p in found["paired"]} == {("lora", "s2ft-default")}
    assert {p["n"] for p in found["paired"]} == {1}
    assert set(found["rates"]) == {"lora", "s2ft-default"}
    assert found["failed"] == []
    table = (compared / "compare.md").read_text()
    assert "| S²FT, default |" in table
    (held_out,) = found["trials"]["s2ft-default"].values()
    assert f"| {held_out:.3f} | {found['rows'][3]['trainable']:,} |" in table
    assert "1 subjects, 1 seed each; held out" in table
    assert "toybox (unweighted" in table
    for name in ("bars", "differences", "losses", "sheet-mittens"):
        with Image.open(compared / f"{name}.png") as image:
            assert min(image.size) > 200
    kept = compared / "cells" / "s2ft-default"
    assert len(list(kept.rglob("weights.safetensors"))) == 1
    assert len(list(kept.rglob("*.png"))) == 4 * 2 + 2
    for method, tried in found["trials"].items():
        (trial,) = (compared / "trials" / method).rglob("cell.json")
        assert list(tried.values()) == [json.loads(trial.read_text())["held_out_loss"]]
        assert "perk-0" in str(trial)
        assert [path.name for path in trial.parent.iterdir() if path.suffix != ""] == ["cell.json"]


@pytest.mark.slow
def test_compare_goes_on_where_it_stopped(compared, capsys) -> None:
    results = sorted(compared.rglob("cell.json"))
    times = {path: path.stat().st_mtime_ns for path in results}
    lost = next(path for path in results if "mittens" in str(path) and "lora" in str(path))
    before = json.loads(lost.read_text())
    lost.unlink()
    assert main(arguments(compared)) == 0
    again = json.loads(lost.read_text())
    for key in ("scores", "losses", "trainable", "bytes", "rate"):
        assert again[key] == before[key]
    assert [path for path in results if path.stat().st_mtime_ns != times[path]] == [lost]
    assert main(arguments(compared, "--steps", "3")) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_cell_is_reported_left_out_and_tried_again(compared, monkeypatch, capsys) -> None:
    extra = arguments(compared, "--seeds", "2")
    train = cells.train

    def failing(method, rate, run, device):
        if method.name == "lora":
            raise RuntimeError("out of luck")
        return train(method, rate, run, device)

    monkeypatch.setattr(cells, "train", failing)
    assert main(extra) == 0
    said = capsys.readouterr()
    assert "failed, to be tried again by the next call: lora at" in said.err
    assert "out of luck" in said.err
    found = json.loads((compared / "compare.json").read_text())
    assert len(found["failed"]) == 1
    assert [row["cells"] for row in found["rows"]] == [1, 1, 1, 2]
    assert "1 trainings failed" in (compared / "compare.md").read_text()
    monkeypatch.undo()
    assert main(extra) == 0
    found = json.loads((compared / "compare.json").read_text())
    assert found["failed"] == []
    assert [row["cells"] for row in found["rows"]] == [1, 1, 2, 2]
    assert not list(compared.rglob("failure.txt"))


@pytest.mark.slow
def test_two_processes_make_the_cells_of_one(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    method = ["--methods", "s2ft-default", "--subjects", "mittens", "salty"]
    assert main(arguments(alone, *method)) == 0
    command = [*TORCHRUN, "-m", "tests.two_evaluations"]
    subprocess.run([*command, str(tmp_path), *arguments(shared, *method)], check=True, env=environment, cwd=ROOT)
    found, scores = [], []
    for folder in (alone, shared):
        cells_made = json.loads((folder / "compare.json").read_text())["cells"]
        found.append([(c["method"], c["subject"], c["trainable"], c["bytes"]) for c in cells_made])
        scores.append([{k: v for k, v in c["scores"].items() if v is not None} for c in cells_made])
    assert found[0] == found[1]
    assert len(found[0]) == 6
    # Which images share a batch, and where they lie in memory, decides the last bits of sums.
    for one, two in zip(*scores, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
    made = [int((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert sum(made) == 4 * (4 * 2 + 2)  # two bases, two trainings
    assert min(made) > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--subjects", "nobody"], "no subject 'nobody'"),
        (["--subjects", "perk"], "other subjects"),
        (["--trials", "0"], "at least 1"),
        (["--subjects_dir", "/no/such"], "no such folder"),
        (["--n_frequency", "1.5"], "n_frequency"),
    ],
)
def test_compare_refuses_what_cannot_work(tmp_path, capsys, change, said) -> None:
    assert main(arguments(tmp_path, *change)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()


def test_a_rate_cannot_be_chosen_by_the_only_photo(tmp_path, capsys) -> None:
    for name in ("one", "two"):
        for path in write_photos("mittens", tmp_path / name)[1:]:
            path.unlink()
    (tmp_path / "classes.txt").write_text("Classes\n\nsubject_name,class\none,cat\ntwo,cat\n")
    given = ["--subjects_dir", str(tmp_path), "--prompts", str(tmp_path / "classes.txt")]
    assert main(arguments(tmp_path / "out", *given, "--development", "one", "--subjects", "two")) == 2
    assert "held out; give two" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "spectrum"])
def test_a_subject_that_would_not_be_read_is_refused(tmp_path, capsys, command) -> None:
    given = ["--output_dir", str(tmp_path), "--subjects", "mittens", "--token", "very " * 40 + "sks"]
    assert main([command, *given]) == 2
    assert "at its end would not be read" in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()
