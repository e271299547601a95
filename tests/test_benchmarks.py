"""Benchmarks are run by hand; here, that they still fit the package they measure."""

from __future__ import annotations

import importlib
import json
import shlex
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("gradio")


SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_explains_itself(name, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train_step", "--rounds 1 --preset_n 300 --no_memory --methods base FourierFT --dtype autocast"),
        (
            "train_step",
            "--shape klein-small --rounds 1 --preset_n 300 --no_memory --dtype bfloat16 --methods S2FT_default",
        ),
        ("train_step", "--preset_n 300 --gradient_checkpointing --profile S2FT_default"),
        ("train_step", "--preset_n 0.0016 --targets all --rounds 1 --no_memory --methods S2FT_default"),
        ("setup", "--n 300 --rounds 1"),
        ("load", "--n 300 --rounds 2 --adapters 2"),
        ("infer", "--n 300 --rounds 1 --dtype bfloat16 --clock cpu"),
        ("size", "--n 300"),
        ("crowd", "--n 300 --adapters 3"),
        ("prior", "--base toybox-flow --truth_steps 1 --draws 1 --estimates 'full .05'"),
        ("held_out", "--subjects mittens --flags '--max_train_steps 2 --n_frequency 100 --estimate gradient'"),
    ],
)
@pytest.mark.slow
def test_it_measures_a_small_shape(name, options, tmp_path, monkeypatch) -> None:
    """What needs a GPU at full size runs here too."""
    command = [option.replace("_default", " default") for option in (*shlex.split(options), "--device", "cpu")]
    if name == "held_out":
        command += ["--output_dir", str(tmp_path)]
    elif "--shape" not in command and name != "prior":
        command += ["--shape", "sd15-small"]
    path = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", *command, "--json", str(path)])
    importlib.import_module(f"benchmarks.{name}").main()
    (run,) = json.loads(path.read_text())
    assert shlex.split(run["command"]) == ["python", "-m", f"benchmarks.{name}", *command]
    assert run["rows"]
