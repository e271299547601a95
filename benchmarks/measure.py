"""What the benchmarks share: alternating measurements, where they were made, and the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each action, in every round one after the other, so that what else goes on strikes all alike.

    In another order each time: what an action leaves behind (caches, freed memory) strikes the one that follows it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    rng = random.Random(0)
    for number in tqdm(range(rounds + warmup), desc="rounds", mininterval=5):
        for name in rng.sample(list(actions), len(actions)):
            begun = clock()
            actions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                seconds[name].append(clock() - begun)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine(device: str = "cpu") -> str:
    """One line about where something was measured."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what every benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the report here as well")
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's own time, on a busy machine")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; floats to three digits."""

    def cell(value: Any) -> str:
        return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows])


def report(name: str, args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Print the table and, with `--json`, add it to that file under the command that made it."""
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *_without_json(sys.argv[1:])])
    print(f"\n{command}\n{machine(args.device)}\n")
    print(table(rows))
    for key, value in facts.items():
        print(f"{key}: {value}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else []
        runs = [run for run in known if run["command"] != command]
        runs.append({"command": command, "machine": machine(args.device), "rows": rows, **facts})
        args.json.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_json(arguments: list[str]) -> list[str]:
    if "--json" in arguments:
        place = arguments.index("--json")
        return arguments[:place] + arguments[place + 2 :]
    return arguments
