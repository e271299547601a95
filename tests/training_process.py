"""Trainings in processes of their own, which a test can stop or kill.

Each is forked from one process that has imported everything: importing torch and diffusers takes many times as long as
a small training.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

BASE = "toybox"  # the tiny base, once a test has asked for its fixture
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Two processes that find each other however busy the machine is.
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    "--rdzv_conf", "read_timeout=900,keep_alive_max_attempt=200",
)  # fmt: skip
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["train_dreambooth_s2ft"])


def arguments(photos: Path, output: Path, *more: str) -> list[str]:
    """The command line of a small training."""
    return [
        "--pretrained_model_name_or_path", BASE, "--instance_dir", str(photos), "--output_dir", str(output),
        "--targets", "qv", "--n_frequency", "200", "--estimate_draws", "1", "--report_to", "none", *more,
    ]  # fmt: skip


def train_here(photos: Path, output: Path, *more: str) -> Path:
    """Run the recipe in this process; returns the adapter's path."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import train_dreambooth_s2ft as recipe

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()
    recipe.main(arguments(photos, output, *more))
    return output / recipe.WEIGHTS_NAME


class Training:
    """The recipe by its command line; `said` is what it writes, to both streams.

    `before` is called in the process first; `environment` is set there.
    """

    def __init__(
        self, argv: Sequence[str], log: Path, before: Callable[[], None] | None = None, **environment: str
    ) -> None:
        self.log = log
        self.process = _forked(list(argv), str(log), before, environment)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def running(self) -> bool:
        return self.process.exitcode is None

    def seconds(self) -> float:
        """Of processor time, which unlike the clock's says how far it has come; after its end, without end."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return math.inf
        return times.user + times.system if self.running() else math.inf

    def wait(self) -> int:
        """Its exit code: negative where a signal ended it."""
        self.process.join()
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Until something has happened, or it has ended."""
        while self.running() and not condition():
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal, and wait for its end."""
        if self.running():
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.process.pid, number)
        return self.wait()


def train(argv: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> Training:
    """A training that has ended well."""
    training = Training(argv, log, before)
    assert training.wait() == 0, training.said[-3000:]
    return training


def _forked(*args: object) -> BaseProcess:
    """A started process. Where the server has died (it could not fork, or something killed it), of another server."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before)))  # the server's, if it starts now
    try:
        for last in (False, False, True):
            process = _SERVER.Process(target=_train, args=args)
            try:
                process.start()
                return process
            except (EOFError, ConnectionError) as error:
                if last:
                    raise RuntimeError("the fork server died three times: its stderr says why") from error
                _wait_for_the_servers_end()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _wait_for_the_servers_end() -> None:
    """Its connections close before it is known as dead, and until then it would be asked again."""
    for _ in range(600):
        if os.waitid(os.P_PID, forkserver._forkserver._forkserver_pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.1)


def train_two(argv: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> None:
    """The recipe in two processes that talk to each other, as `accelerate launch` starts them."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    both = [
        Training(argv, log.with_suffix(f".{rank}"), before, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in range(2)
    ]
    assert [each.wait() for each in both] == [0, 0], both[0].said[-3000:] + both[1].said[-3000:]


def _train(argv: list[str], log: str, before: Callable[[], None] | None, environment: dict[str, str]) -> None:
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(to, stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(ENVIRONMENT | environment)
    os.chdir(ROOT)
    import torch

    import train_dreambooth_s2ft as recipe

    torch.set_num_threads(1)
    if before:
        before()
    with recipe.exit_codes("train_dreambooth_s2ft.py"):
        recipe.main(argv)
