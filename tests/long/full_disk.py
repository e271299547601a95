"""A training whose disk is full, or read-only, from a random moment on: what was complete stays, and it goes on later.

    python -m tests.long.full_disk --moments 20

Linux with user namespaces: the disk is a tmpfs that only this process and its children see. After each moment the
training ends in one line, all its checkpoints can be read, and there is room again; a run that has ended is compared
with one that always had room.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from s2ft_diffusion.adapters.file import WEIGHTS_NAME, read_adapter
from s2ft_diffusion.dreambooth.checkpoints import list_checkpoints, read_state
from tests.long.killing import arguments, facts, few_steps, prepare, whole_run
from tests.training_process import Training


@contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """All of a disk is taken, to the last byte."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    yield
    ballast.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True).returncode:
        time.sleep(0.001)  # a file is being written
    yield
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        os.execvp(
            "unshare", ["unshare", "-rm", sys.executable, "-m", "tests.long.full_disk", *sys.argv[1:], "--inside"]
        )
    draw, ends, moments = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        whole, wanted = whole_run(folder)
        with mounted(folder / "disk") as disk:
            output = disk / "run"
            while moments.total() < args.moments:
                training = Training(arguments(folder, output), folder / "log", few_steps)
                before, moment = set(), draw.uniform(0.2, 1) * whole
                training.wait_until(lambda training=training, moment=moment: training.seconds() > moment)
                if training.running():
                    nothing_more = draw.choice((full, read_only))
                    moments[nothing_more.__name__] += 1
                    with nothing_more(disk):
                        before = {path.name for path in list_checkpoints(output / "out")}
                        ends[training.wait()] += 1
                assert training.wait() in (0, 1, 2), training.said[-3000:]
                assert "Traceback" not in training.said, training.said[-3000:]
                after = list_checkpoints(output / "out")
                assert before - {path.name for path in after} == set() or len(after) == 2
                for path in after:
                    assert read_state(path).step == int(path.name.removeprefix("checkpoint-"))
                    read_adapter(path / WEIGHTS_NAME)
                if training.wait() == 0:
                    found = facts(output)
                    different = [name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name)]
                    assert not different, different
                    shutil.rmtree(output)
                    print(f"{dict(moments)}; exit codes {dict(ends)}; a run ended as the whole one", flush=True)
    print(f"{dict(moments)}; exit codes {dict(ends)}: nothing was lost")


if __name__ == "__main__":
    main()
