"""What `compare` and `ablation` do with methods: each gets a rate on development subjects, then all run on others."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from s2ft_diffusion.dreambooth.errors import InputError

from .cells import Cell, Laboratory, open_laboratory
from .methods import BASE, Method
from .protocol import Protocol, Subject, find_subjects, work_alone
from .rates import best_rate, next_rate
from .table import summarize


@dataclass(frozen=True)
class Study:
    """A finished study: its report, and the cells it was made from, those of the base apart."""

    protocol: Protocol
    subjects: list[Subject]
    bases: list[Cell]
    cells: list[Cell]
    report: dict[str, Any]

    def write(self, name: str, table: str) -> None:
        """`NAME.json` and `NAME.md` in the output folder; prints the table, and what failed."""
        folder = self.cells[0].root
        text = json.dumps(self.report, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        for item in self.report["failed"]:
            print(f"failed, to be tried again by the next call: {item['cell']}: {item['error']}", file=sys.stderr)


def run_study(args: argparse.Namespace, methods: Sequence[Method], beside: str | None = None) -> Study | None:
    """Train, picture and score all cells that are not finished; None where another process writes the report.

    With several processes (`accelerate launch`, or the same command in another terminal), each takes what no other is
    at. The report has paired differences of every two methods, or of one `beside` all others. Raises InputError or
    EncoderError before anything is trained.
    """
    first = work_alone(args)
    if args.trials < 1:
        raise InputError(f"--trials must be at least 1, got {args.trials}.")
    development, subjects = find_subjects(args)
    laboratory = open_laboratory(args)
    cell = partial(Cell, args.output_dir)
    bases = laboratory.make_bases(args.output_dir, [*subjects, *development])[: len(subjects)]
    trials, failed = _try_rates(laboratory, cell, methods, development, args.trials)
    rates = {name: best_rate(tried) for name, tried in trials.items()}
    cells = [cell(m, rates[m.name], s, n) for n in range(args.seeds) for s in subjects for m in methods]
    failed += laboratory.make_all(cells)
    if not first:
        return None
    report = {
        "command": shlex.join(["python", "-m", "eval", *sys.argv[1:]]),
        "protocol": asdict(laboratory.protocol), "development": [s.name for s in development],
        "subjects": [s.name for s in subjects], "seeds": args.seeds,
        **summarize([BASE, *methods], [*bases, *cells], beside), "trials": trials, "rates": rates,
        "failed": [{"cell": str(c), "error": c.failure()} for c in failed],
    }  # fmt: skip
    return Study(laboratory.protocol, subjects, bases, cells, report)


def _try_rates(
    laboratory: Laboratory,
    cell: partial[Cell],
    methods: Sequence[Method],
    development: Sequence[Subject],
    trials: int,
) -> tuple[dict[str, dict[float, float]], list[Cell]]:
    """Each method's rates with their merits, as many for each; and the cells that failed."""
    tried: dict[str, dict[float, float]] = {method.name: {} for method in methods}
    failed: list[Cell] = []
    for _ in range(trials):
        rates = {method: next_rate(method.rate, tried[method.name]) for method in methods}
        failed += laboratory.make_all([cell(m, r, s, 0) for s in development for m, r in rates.items()])
        for method, rate in rates.items():
            found = [(cell(method, rate, s, 0), cell(BASE, 0.0, s, 0)) for s in development]
            tried[method.name][rate] = statistics.fmean(merit(*pair) for pair in found)
    return tried, failed


def merit(cell: Cell, base: Cell) -> float:
    """What chooses a learning rate: the harmonic mean of likeness to the subject and faithfulness to the prompt.

    Likeness is the share of the way from the base's images to the real photos, the mean of DINO's and CLIP-I's;
    faithfulness is CLIP-T relative to the base's. -inf for a cell that failed.
    """
    found, start = cell.result(), base.result()
    if found is None or start is None:
        return float("-inf")
    scores, before, real = found["scores"], start["scores"], found["real"]
    way = [(scores[m] - before[m]) / (real[m] - before[m]) for m in ("dino", "clip_i")]
    return statistics.harmonic_mean([max(statistics.fmean(way), 0.0), max(scores["clip_t"] / before["clip_t"], 0.0)])
