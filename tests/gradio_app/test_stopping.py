"""`python -m app` as a process: it stops when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_when_told_to(tmp_path, number) -> None:
    """Also where whoever started it ignores Ctrl-C, as a shell does for what runs in its background."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "--port", "0", "--outputs", str(tmp_path / "outputs")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        said = ""
        for line in process.stderr:
            said += line
            if ", at http" in line:
                break
        assert ", at http" in said, said
        process.send_signal(number)
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
