"""What the tests themselves rest on."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import forkserver

import pytest

from tests.training_process import Training


@pytest.mark.slow
def test_a_training_begins_though_the_fork_server_dies(tmp_path) -> None:
    flags = ["--instance_dir", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "out")]
    assert Training(flags, tmp_path / "log").wait() == 2
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)  # so that it dies with a start on its way
    threading.Timer(1.0, os.kill, (server, signal.SIGKILL)).start()
    assert Training(flags, tmp_path / "log").wait() == 2
    assert forkserver._forkserver._forkserver_pid != server
