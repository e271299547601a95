"""Benchmarks are run by hand; here, that they still fit the package they measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("gradio")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in Path(ROOT / "benchmarks").glob("*.py") if path.stem != "__init__")
)
def test_it_explains_itself(name) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{name}" in done.stdout
