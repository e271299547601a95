"""The examples on several processes: what they train is what one process trains, and S2FT layers can be sharded."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import text_classification
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.examples.conftest import quick
from tests.training_process import TORCHRUN


@pytest.mark.slow
def test_two_processes_train_what_one_does(bert, reviews, tmp_path) -> None:
    def argv(output: Path, batch: int) -> list[str]:
        files = ["--train_file", str(reviews / "train.csv"), "--test_file", str(reviews / "test.csv")]
        more = ["--per_device_train_batch_size", str(batch), "--num_train_epochs", "1", "--save_strategy", "no"]
        return quick(output, "--model_name_or_path", bert, *files, *more, "--learning_rate", "1e-2")

    script = ROOT / "tests" / "examples" / "two_processes.py"
    path = os.pathsep.join([str(ROOT / "examples"), str(ROOT)])
    ran = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path), bert, *argv(tmp_path / "two", 4)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    facts = text_classification.main(argv(tmp_path / "one", 8))
    there = json.loads((tmp_path / "two" / "results.json").read_text())
    assert there["steps"] == facts["steps"] == 8
    assert there["metrics"]["test_loss"] == pytest.approx(facts["metrics"]["test_loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-4)

    for rank in range(2):  # sharded by FSDP 2 without accelerate, which has it on accelerators alone
        losses = json.loads((tmp_path / f"losses{rank}.json").read_text())
        assert losses["sharded"] == pytest.approx(losses["whole"], rel=1e-4)
        assert losses["whole"][0] != losses["whole"][2]
        assert losses["numbers of this rank"] < 0.6 * losses["numbers"]
