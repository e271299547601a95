"""`python -m eval ablation` and `spectrum`: whole runs of the smallest size."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("open_clip")

from eval import ablation, spectrum
from eval.__main__ import main
from tests import two_evaluations
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    two_evaluations.small(monkeypatch.setattr)


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
    grid, free = (row["trainable"] for row in report["rows"][2:])
    assert 0.95 * free < grid <= free  # a whole table has at most as many numbers as were asked for
    assert {(p["a"], p["b"]) for p in report["paired"]} == {("ablation-default", "coefficients-real")}
    assert "| coefficients: real |" in (tmp_path / "ablation.md").read_text()


@pytest.mark.slow
def test_ablation_by_unseen_pictures_alone(tmp_path) -> None:
    options = [
        "ablation", "--groups", "coefficients", "--development", "perk", "trek", "--trials", "2", "--trial_seeds", "2",
        "--seeds", "0", "--steps", "2", "--batch", "1", "--targets", "qv", "--device", "cpu", "--output_dir",
        str(tmp_path),
    ]  # fmt: skip
    assert main(options) == 0
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["ablation-default", "coefficients-real"]
    found = [json.loads(path.read_text()) for path in tmp_path.rglob("ablation-default/**/cell.json")]
    best = [cell for cell in found if cell["rate"] == report["rates"]["ablation-default"]]
    assert [len(found), len(best)] == [6, 4]  # the rate that the second seed is not trained at lost by the first
    losses = [cell["held_out_loss"] for cell in best]
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


@pytest.mark.slow
def test_spectrum_reports_and_resumes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(spectrum, "CHECK_EVERY", 2)
    few = {name: (kind, 1) for name, (kind, _) in spectrum.PRIORS.items()}
    monkeypatch.setattr(spectrum, "PRIORS", few)
    options = [
        "spectrum", "--subjects", "mittens", "--truth_steps", "4", "--device", "cpu", "--output_dir", str(tmp_path),
        "--adapter", str(ROOT / "app" / "adapters" / "mittens.safetensors"),
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
    assert report["adapter"]["layers"] == 28  # of those that the adapter has, convolutions too
    assert 0 < report["adapter"]["reached"] <= 1
    assert len(report["layers"]["mittens"]["+ complex"]["top"]) == 28
    assert (tmp_path / "spectrum.png").exists()
    assert "| + complex |" in (tmp_path / "spectrum.md").read_text()
    before = (tmp_path / "mittens.json").stat().st_mtime_ns
    assert main(options) == 0
    assert (tmp_path / "mittens.json").stat().st_mtime_ns == before
    assert main([*options, "--truth_steps", "1"]) == 2
    assert "--truth_steps" in capsys.readouterr().err
