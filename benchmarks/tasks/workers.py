"""A queue of runs over worker processes, each of which trains several at a time on one device."""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .data import unpack_models
from .runs import Run, with_rate

MOST_RESTARTS = 4


def work(
    pipe: Connection,
    data: Path,
    models: Path,
    device_name: str,
    together: int,
    until: float,
    epochs: float,
    small: bool,
) -> None:
    """A worker: asks for runs, trains them, sends their rows back, one by one; ends when there are none left."""
    import torch

    from .training import load_task, train_together

    gc.freeze()  # recording a graph collects garbage, and need not look at what was imported
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
    device = torch.device(device_name)
    streams: list[Any] = []
    tasks: dict[str, Any] = {}
    while True:
        pipe.send(("ready", together if device.type == "cuda" else 1))
        runs = pipe.recv()
        if not runs:
            return
        if not streams:  # a GPU is left alone until there is something to do
            streams = [torch.cuda.Stream() for _ in range(together)] if device.type == "cuda" else [None]
        name = runs[0].task
        if name not in tasks:
            tasks[name] = load_task(name, data, models, device, epochs, small)
            if device.type == "cuda":
                torch.cuda.synchronize()  # other streams are to read it
        for row in train_together(tasks[name], runs, streams, until):
            pipe.send(("row", row))


def choose(pending: list[Run], rows: list[dict[str, Any]], most: int) -> list[Run]:
    """The first runs of one task whose rates are known, taken off `pending`."""
    chosen: list[Run] = []
    for run in list(pending):
        if len(chosen) == most:
            break
        if chosen and run.task != chosen[0].task:
            continue
        if (found := with_rate(run, rows)) is not None:
            pending.remove(run)
            chosen.append(found)
    return chosen


def run_queue(
    pending: list[Run],
    path: Path,
    data: Path,
    *,
    device: str,
    workers: int,
    together: int,
    seconds: float,
    epochs: float = 1.0,
    small: bool = False,
    first: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Run what is pending, in its order, for at most so many seconds; every row is in the file once it is there.

    Rows of the file are not made again; those with an error are tried again by the next call. `first` is called while
    the workers only import what they need. Returns all rows. Raises ValueError where the file has rows of other
    `epochs` or `small`: they are of other tasks.
    """
    until = time.time() + seconds
    setting = {"epochs": epochs, "small": small}
    rows = read_rows(path)
    if others := [row for row in rows if any(row.get(name) != value for name, value in setting.items())]:
        there = {name: others[0].get(name) for name in setting}
        raise ValueError(f"{path} has rows of {there}, not of {setting}; give another --rows.")
    made = {Run.from_row(row).key() for row in rows}
    pending = [run for run in pending if run.key() not in made]
    failed: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, path.open("a", encoding="utf-8") as file:
        models = Path(scratch)
        unpack_models(data, models)
        busy: dict[Any, tuple[Any, list[Run]]] = {}
        idle: dict[Any, int] = {}
        restarts = 0

        def begin() -> None:
            ours, theirs = context.Pipe()
            arguments = (theirs, data, models, device, together, until, epochs, small)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            busy[ours] = process, []

        for _ in range(workers):
            begin()
        if first is not None:
            first()
        while busy and time.time() < until + 5:
            for pipe in list(idle):
                chosen = choose(pending, rows + failed, idle[pipe])
                if chosen or not (pending and any(runs for _, runs in busy.values())):
                    del idle[pipe]
                    busy[pipe][1].extend(chosen)
                    pipe.send(chosen)
            for pipe in wait(list(busy), timeout=1.0):
                process, runs = busy[pipe]
                try:
                    kind, found = pipe.recv()
                except EOFError:
                    process.join()
                    del busy[pipe]
                    idle.pop(pipe, None)
                    if process.exitcode != 0 and time.time() < until:
                        print(f"a worker ended with exit code {process.exitcode}; it had {runs}", flush=True)
                        failed += [run.row() | {"error": f"exit code {process.exitcode}"} for run in runs]
                        restarts += 1
                        if restarts <= MOST_RESTARTS:
                            begin()
                    continue
                if kind == "ready":
                    runs.clear()
                    idle[pipe] = found
                    continue
                key = Run.from_row(found).key()
                runs[:] = [run for run in runs if run.key() != key]
                if "error" in found:
                    print(f"failed: {found}", flush=True)
                    failed.append(found)
                else:
                    found |= setting
                    rows.append(found)
                    file.write(json.dumps(found) + "\n")
                    file.flush()
        for process, _ in busy.values():
            process.kill()
    left = len(pending)
    print(
        f"{len(rows)} rows, {len(failed)} failed, {left} not begun, {time.time() - until + seconds:.0f} s", flush=True
    )
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
