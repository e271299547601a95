"""`python -m eval compare` and `spectrum`: the search, the statistics, and whole runs of the smallest size."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

pytest.importorskip("open_clip")

from eval import ablation, cells, compare, methods, spectrum
from eval.__main__ import main
from eval.methods import LORA_NUMBERS, METHODS, lora_rank, numbers, peft_config, s2ft
from eval.plots import plot_tradeoff
from eval.protocol import Subject, find_subjects, make_quick
from eval.rates import STEP, best_rate, next_rate
from eval.statistics import mean_and_error, paired_difference
from eval.training import Run, Session, held_out_loss, peak_memory, train
from s2ft_diffusion.dreambooth.errors import InputError
from s2ft_diffusion.pipelines.targets import attention_targets
from s2ft_diffusion.toybox.subjects import SUBJECTS, write_photos
from s2ft_diffusion.toybox.world import BACKGROUNDS
from tests.training_process import TORCHRUN

ROOT = Path(__file__).resolve().parents[1]


def search(loss, start: float, trials: int) -> dict[float, float]:
    tried: dict[float, float] = {}
    for _ in range(trials):
        rate = next_rate(start, tried)
        tried[rate] = loss(rate)
    return tried


@pytest.mark.parametrize("optimum", [1e-4, 1e-3, 2e-3, 1e-2])
def test_the_search_for_a_rate_passes_the_optimum(optimum) -> None:
    tried = search(lambda rate: abs(math.log(rate / optimum)), 1e-3, 5)
    assert len(tried) == 5
    best = best_rate(tried)
    assert abs(math.log10(best / optimum)) <= 0.25 + 1e-6
    assert min(tried) < optimum * 1.01
    assert max(tried) > optimum * 0.99


def test_a_rate_that_fails_is_gone_away_from() -> None:
    tried = search(lambda rate: math.inf if rate > 2e-3 else 1 - rate, 1e-2, 3)
    assert best_rate(tried) == pytest.approx(1e-2 / STEP / STEP)


def test_means_and_paired_differences() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == {"mean": 2.0, "stderr": pytest.approx(1 / 3**0.5)}
    assert mean_and_error([1.0]) == {"mean": 1.0, "stderr": None}
    first = {(s, n): 0.5 + 0.1 * i + 0.01 * n for i, s in enumerate("abcdef") for n in (0, 1)}
    second = {key: value - 0.2 - (0.02 if key[0] < "d" else 0.0) for key, value in first.items()}
    found = paired_difference(first, {**second, ("elsewhere", 0): 9.0})
    assert found["n"] == 12
    assert found["mean"] == pytest.approx(0.21)
    assert 0.2 <= found["low"] < 0.21 < found["high"] <= 0.22
    same = paired_difference(first, {key: value - 0.1 for key, value in first.items()})
    assert same["low"] == pytest.approx(0.1)
    alone = paired_difference({("a", 0): 1.0}, {("a", 0): 0.5})
    assert (alone["mean"], alone["low"], alone["high"], alone["n"]) == (0.5, None, None, 1)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(60):
        values = 1.0 + torch.randn(12, generator=generator)
        subjects = [(str(i), 0) for i in range(12)]
        found = paired_difference(dict(zip(subjects, values.tolist(), strict=True)), dict.fromkeys(subjects, 0.0))
        held += found["low"] <= 1.0 <= found["high"]
    assert 50 <= held <= 60


def test_sizes_are_in_the_relation_that_is_compared(toybox_pipe) -> None:
    unet = toybox_pipe.unet
    targets = attention_targets(unet)
    ours = sum(numbers(0.02, unet.get_submodule(name)) for name in targets)
    counts = {}
    for kind in ("lora", "lora-bytes", "oft", "fourierft", "waveft"):
        adapted = type(unet).from_config(unet.config)
        adapted.requires_grad_(False)
        adapted.add_adapter(peft_config(kind, adapted, targets, 0.02, 0))
        counts[kind] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counts["lora"] >= LORA_NUMBERS * ours
    assert counts["lora"] < LORA_NUMBERS * ours * (1 + 1 / lora_rank(unet, targets, 0.02))
    for kind in ("fourierft", "waveft"):
        assert ours / counts[kind] == pytest.approx(0.8, rel=1e-3)
    assert counts["lora"] / 2.1 < counts["oft"] <= counts["lora"]  # blocks are powers of two
    # S²FT's file: its numbers in half precision, and of every row and column an order of eight bits and a sign.
    sides = sum(sum(unet.get_submodule(name).weight.shape) for name in targets)
    allowed = 2 * ours + sides * 9 / 8
    assert 2 * counts["lora-bytes"] <= allowed < 2 * (counts["lora-bytes"] + sides)


def test_what_adapts_no_convolution_has_as_many_numbers_in_the_linear_layers(toybox_pipe) -> None:
    unet = toybox_pipe.unet
    targets = attention_targets(unet, "all")
    ours = sum(numbers(0.002, unet.get_submodule(name)) for name in targets)
    for kind in ("fourierft", "lora"):
        adapted = type(unet).from_config(unet.config)
        adapted.requires_grad_(False)
        adapted.add_adapter(peft_config(kind, adapted, targets, 0.002, 0))
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if kind == "lora":
            assert LORA_NUMBERS <= count / ours < LORA_NUMBERS * (1 + 1 / lora_rank(unet, targets, 0.002) + 0.1)
        else:
            assert ours / count == pytest.approx(0.8, rel=5e-3)
        found = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
        convolutions = {name for name in found if isinstance(unet.get_submodule(name), torch.nn.Conv2d)}
        assert bool(convolutions) == (kind == "lora")


def test_there_is_always_another_rate_to_try() -> None:
    tried: dict[float, float] = {}
    for _ in range(15):
        rate = next_rate(1e-2, tried)
        assert rate not in tried
        tried[rate] = abs(math.log(rate / 1e-2))
    assert best_rate(tried) == 1e-2


def test_a_method_whose_trainings_all_failed_is_not_plotted(tmp_path) -> None:
    score = {"mean": 0.5, "stderr": 0.1}
    rows = [
        {"method": "lora", "title": "LoRA", "share": 0.01, "dino": score, "clip_t": score},
        {"method": "fourierft", "title": "FourierFT", "share": None, "dino": None, "clip_t": None},
    ]
    plot_tradeoff({"rows": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_quick_leaves_what_one_says() -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    args = parser.parse_args(["--quick", "--subjects", "dash", "--seeds", "3"])
    make_quick(args, compare.add_arguments, compare.QUICK)
    assert (args.subjects, args.seeds, args.steps) == (["dash"], 3, 60)


def test_a_method_knows_when_it_has_become_another() -> None:
    default, paper = (m.definition() for m in METHODS if m.kind == "s2ft")
    assert default != paper
    changed = s2ft("s2ft-default", "another title", 1.0, gamma=3.0)
    assert changed.definition() != METHODS[-1].definition()
    assert s2ft("s2ft-default", "x", 9.0).definition() == METHODS[-1].definition()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
def test_peak_memory_counts_what_is_freed_again() -> None:
    with peak_memory("cpu") as peak:
        block = torch.ones(50 * 2**20 // 4)
        del block
    assert 45 * 2**20 < peak.bytes < 80 * 2**20


def test_a_prior_is_kept_for_other_rates_and_grids(tmp_path, monkeypatch) -> None:
    made = []

    def estimate(model, loss, batches, *, estimate) -> dict[str, torch.Tensor]:
        made.append(estimate)
        return {"layer": torch.full((2, 3), float(len(made)))}

    monkeypatch.setattr("eval.training.estimate_prior", estimate)
    write_photos("perk", tmp_path / "photos")
    run = Run("toybox", tmp_path / "photos", "a photo of sks mug", 0, 0.02, steps=2, priors=tmp_path / "priors")
    paper, default = (m for m in METHODS if m.kind == "s2ft")
    for method in (paper, paper, default):
        Session(run, method.adapter).prior(method.estimate)
    assert made == [paper.estimate.kind, default.estimate.kind]
    kept = Session(run, paper.adapter).prior(paper.estimate)
    assert torch.equal(kept["layer"], torch.ones(2, 3))
    Session(replace(run, seed=1), paper.adapter).prior(paper.estimate)
    assert len(made) == 3


@pytest.mark.slow
def test_pictures_that_are_held_out_are_not_trained_on(tmp_path) -> None:
    photos = write_photos("perk", tmp_path / "all")
    for path in write_photos("perk", tmp_path / "some")[-2:]:
        path.unlink()
    lora = next(m for m in METHODS if m.kind == "lora")
    common = {"base": "toybox", "instance_prompt": "a photo of sks dog", "seed": 0, "n_frequency": 0.02, "steps": 2}
    subject = Subject("perk", "dog", tmp_path / "all")
    assert subject.held_out() == ((photos[-2], ""), (photos[-1], ""))
    held_out = Run(photos=tmp_path / "all", held_out=subject.held_out(), **common)
    fewer = Run(photos=tmp_path / "some", **common)
    assert train(lora, 1e-3, held_out).losses == pytest.approx(train(lora, 1e-3, fewer).losses, rel=1e-5)
    assert held_out_loss(lora, 0.0, held_out) == 1.0
    assert held_out_loss(lora, 1e-3, held_out) != 1.0
    one, other = (Session(held_out, method.adapter).held_out_loss() for method in (lora, METHODS[-1]))
    assert one == pytest.approx(other, rel=1e-5)  # all methods are judged by the same draws


def test_a_toybox_subject_is_judged_by_scenes_that_its_photos_do_not_show(tmp_path) -> None:
    args = Namespace(subjects_dir=None, output_dir=tmp_path, development=["perk"], subjects=None)
    (subject,), others = find_subjects(args)
    assert {other.name for other in others} == SUBJECTS.keys() - {"perk"}
    args.subjects = ["mocha"]  # one of the further ones, which take part where they are named
    assert [other.name for other in find_subjects(args)[1]] == ["mocha"]
    drawn = {path.name for path in (args.output_dir / "subjects").iterdir()}
    assert drawn == {subject.name, "mocha", *(other.name for other in others)}  # no others' pictures are written
    held_out = subject.held_out()
    assert len(held_out) == 8
    assert {words for _, words in held_out}.isdisjoint(BACKGROUNDS[n] for n in SUBJECTS["perk"].photo_backgrounds())
    common = {"base": "toybox", "instance_prompt": "a photo of sks cat", "seed": 0, "n_frequency": 0.02, "steps": 1}
    named = Session(Run(photos=subject.photos, held_out=held_out, **common))
    assert len(named.source) == 6
    unnamed = Session(Run(photos=subject.photos, held_out=tuple((path, "") for path, _ in held_out), **common))
    assert named.held_out_loss() < unnamed.held_out_loss()  # the base knows the scenes by their words


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "compare", "--output_dir", str(folder), "--device", "cpu", "--methods", "lora", "s2ft-default",
        "--development", "perk", "--subjects", "mittens", "--trials", "1", "--seeds", "1", "--steps", "2",
        "--batch", "1", "--images_per_prompt", "2", "--drift_images", "1", "--sampling_steps", "1", *more,
    ]  # fmt: skip


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
    assert f"| {held_out:.3f} | 16,204 |" in table
    assert "1 subjects, 1 seed each; held out" in table
    assert "toybox (unweighted" in table
    for name in ("bars", "tradeoff", "losses", "sheet-mittens"):
        with Image.open(compared / f"{name}.png") as image:
            assert min(image.size) > 200
    kept = compared / "cells" / "s2ft-default"
    assert len(list(kept.rglob("weights.safetensors"))) == 1
    assert len(list(kept.rglob("*.png"))) == 14 * 2 + 8
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
    command = [sys.executable, "-m", "eval", *arguments(alone, *method)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    command = [*TORCHRUN, "tests/two_evaluations.py"]
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
    assert sum(made) == 4 * (14 * 2 + 8)  # two bases, two trainings
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


def test_subjects_of_dreambench_as_distributed(tmp_path, monkeypatch) -> None:
    for name in ("dog6", "rc_car", "unnamed"):
        write_photos("mittens", tmp_path / name)
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ndog6,dog\nrc_car,toy\n\nPrompts\n\nObject Prompts\n"
    )
    args = Namespace(subjects_dir=tmp_path, prompts=None, development=None, subjects=None, output_dir=tmp_path / "out")
    development, subjects = find_subjects(args)
    assert [(s.name, s.class_name) for s in (*development, *subjects)] == [("dog6", "dog"), ("rc_car", "toy")]
    args.output_dir = tmp_path / "dog6" / "." / ".." / "dog6"
    with pytest.raises(InputError, match="--output_dir and the photos of dog6 are one folder"):
        find_subjects(args)


def test_every_variant_of_the_ablation_is_one_of_its_own() -> None:
    definitions = [json.dumps(variant.definition()) for variant in ablation.methods(list(ablation.VARIANTS))]
    assert len(set(definitions)) == len(definitions) > 20


@pytest.mark.slow
def test_ablation_reports(tmp_path) -> None:
    options = [
        "ablation", "--groups", "coefficients", "--subjects", "mittens", "--development", "perk", "--trials", "1",
        "--seeds", "1", "--steps", "2", "--batch", "1", "--images_per_prompt", "2", "--drift_images", "1",
        "--sampling_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    assert main(options) == 0
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["drawn", "base", "ablation-default", "coefficients-real"]
    assert report["rows"][2]["trainable"] == pytest.approx(report["rows"][3]["trainable"], rel=2e-3)
    assert {(p["a"], p["b"]) for p in report["paired"]} == {("ablation-default", "coefficients-real")}
    assert "| coefficients: real |" in (tmp_path / "ablation.md").read_text()


def test_a_method_is_another_one_under_another_rule_for_its_estimate(monkeypatch) -> None:
    before = {method.name: method.definition() for method in METHODS}
    monkeypatch.setattr(methods, "ESTIMATE_SHARE", 0.5)
    changed = [method.name for method in METHODS if method.definition() != before[method.name]]
    assert changed == ["s2ft-default"]


@pytest.mark.slow
def test_ablation_by_unseen_pictures_alone(tmp_path) -> None:
    options = [
        "ablation", "--groups", "coefficients", "--development", "perk", "trek", "--trials", "1", "--trial_seeds", "2",
        "--seeds", "0", "--steps", "2", "--batch", "1", "--device", "cpu", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    assert main(options) == 0
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["ablation-default", "coefficients-real"]
    losses = [json.loads(path.read_text())["held_out_loss"] for path in tmp_path.rglob("ablation-default/**/cell.json")]
    assert len(losses) == 4
    assert report["rows"][0]["held_out"]["mean"] == pytest.approx(sum(losses) / 4)
    assert report["rows"][0]["held_out"]["stderr"] > 0
    assert [(p["metric"], p["n"]) for p in report["paired"]] == [("held_out", 4)]
    assert not list(tmp_path.rglob("cells"))
    table = (tmp_path / "ablation.md").read_text()
    assert "DINO" not in table
    row = next(line for line in table.splitlines() if line.startswith("| coefficients: real |"))
    difference = (
        -report["paired"][0]["mean"] if report["paired"][0]["a"] != "ablation-default" else report["paired"][0]["mean"]
    )
    assert f"{difference:+.3f}" in row
    assert main([*options, "--seeds", "-1"]) == 2
    assert main(["compare", *options[3:]]) == 2


@pytest.mark.slow
def test_spectrum_reports_and_resumes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(spectrum, "CHECK_EVERY", 2)
    few = {name: (kind, 1) for name, (kind, _) in spectrum.PRIORS.items()}
    monkeypatch.setattr(spectrum, "PRIORS", few)
    options = [
        "spectrum", "--subjects", "salty", "--truth_steps", "4", "--device", "cpu", "--output_dir", str(tmp_path),
        "--adapter", str(ROOT / "app" / "adapters" / "salty.safetensors"),
    ]  # fmt: skip
    assert main(options) == 0
    report = json.loads((tmp_path / "spectrum.json").read_text())
    rows = {row["construction"]: row for row in report["rows"]}
    paper = rows["paper: nearest neighbour, real"]
    assert paper["sampled_to_paper"] == pytest.approx(1.0)
    assert paper["objective"]["mean"] < rows["no rearrangement"]["objective"]["mean"]
    oracle = rows["default, ordered by the true change"]
    assert oracle["top"]["mean"] == max(row["top"]["mean"] for row in rows.values())
    assert all(0 < row[key]["mean"] < 1 for row in rows.values() for key in ("sampled", "top"))
    assert 0 < report["adapter"]["reached"] <= 1
    assert len(report["layers"]["salty"]["+ complex"]["top"]) == 28
    assert (tmp_path / "spectrum.png").exists()
    assert "| + complex |" in (tmp_path / "spectrum.md").read_text()
    before = (tmp_path / "salty.json").stat().st_mtime_ns
    assert main(options) == 0
    assert (tmp_path / "salty.json").stat().st_mtime_ns == before
    assert main([*options, "--truth_steps", "1"]) == 2
    assert "--truth_steps" in capsys.readouterr().err
