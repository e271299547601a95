"""What `compare` and `ablation` do with methods: each gets a rate on development subjects, then all run on others."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2ft_diffusion.dreambooth.images import find_images
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.text import printable

from .cells import Cell, Laboratory, Trial
from .generation import claim
from .methods import REFERENCES, Method
from .protocol import Protocol, make_protocol, own_process
from .rates import best_rate, next_rate
from .score import encoders_for
from .subjects import Subject, find_subjects
from .table import summarize


@dataclass(frozen=True)
class Study:
    """A finished study: its report, and the cells it was made from, those that nothing was trained for apart."""

    folder: Path
    protocol: Protocol
    subjects: list[Subject]
    references: list[Cell]
    cells: list[Cell]
    report: dict[str, Any]

    def write(self, name: str, table: str) -> None:
        """`NAME.json` and `NAME.md` in the output folder; prints the table, and what failed."""
        text = printable(json.dumps(self.report, indent=1, ensure_ascii=False))
        table = printable(table)
        (self.folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        for item in self.report["failed"]:
            print(f"failed, to be tried again by the next call: {item['cell']}: {item['error']}", file=sys.stderr)


def run_study(args: argparse.Namespace, methods: Sequence[Method], beside: str | None = None) -> Study | None:
    """Train, picture and score all cells that are not finished; None where another process writes the report.

    With several processes (`accelerate launch`, or the same command in another terminal), each takes what no other is
    at. The report has paired differences of every two methods, or of one `beside` all others. Raises InputError or
    EncoderError before anything is trained.
    """
    first, device = own_process(args.device)
    for name, least in (("trials", 1), ("trial_seeds", 1), ("seeds", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    development, subjects = find_subjects(args)
    for subject in development:
        if not subject.elsewhere and len(find_images(subject.photos)) < 2:
            raise InputError(f"{subject.photos}: a learning rate is chosen by a photo that is held out; give two.")
    encoders = encoders_for(args, device)
    protocol = make_protocol(args, encoders.names)
    protocol.check_prompts([*development, *subjects])
    claim(args.output_dir, json.loads(json.dumps(asdict(protocol))))  # as a file gives it back, without tuples
    laboratory = Laboratory(protocol, encoders, device)
    references = laboratory.make_references(args.output_dir, subjects if args.seeds else [])

    def trials_of(method: Method, rate: float, seed: int = 0) -> list[Trial]:
        return [Trial(args.output_dir, method, rate, subject, seed) for subject in development]

    losses, failed = _try_rates(laboratory, trials_of, methods, args.trials)
    rates = {name: best_rate(tried) for name, tried in losses.items()}
    kinds = [(method, rates[method.name]) for method in methods]
    chosen = [trial for n in range(args.trial_seeds) for kind in kinds for trial in trials_of(*kind, n)]
    failed += laboratory.make_all([trial for trial in chosen if trial.seed])
    cells = [Cell(args.output_dir, m, rate, s, n) for n in range(args.seeds) for s in subjects for m, rate in kinds]
    failed += laboratory.make_all(cells)
    if not first:
        return None
    report = {
        "command": shlex.join(["python", "-m", "eval", *sys.argv[1:]]),
        "protocol": asdict(laboratory.protocol), "development": [s.name for s in development],
        "trial_seeds": args.trial_seeds, "subjects": [s.name for s in subjects] if args.seeds else [],
        "seeds": args.seeds,
        **summarize([*REFERENCES, *methods], [*references, *cells], chosen, beside), "rates": rates,
        "trials": {m: {r: v if v < math.inf else None for r, v in tried.items()} for m, tried in losses.items()},
        "failed": [{"cell": str(c), "error": c.failure()} for c in failed],
    }  # fmt: skip
    return Study(args.output_dir, laboratory.protocol, subjects, references, cells, report)


def _try_rates(
    laboratory: Laboratory, trials_of: Callable[[Method, float], list[Trial]], methods: Sequence[Method], count: int
) -> tuple[dict[str, dict[float, float]], list[Cell]]:
    """Each method's rates with their mean held-out loss, as many for each; and the trials that failed."""
    tried: dict[str, dict[float, float]] = {method.name: {} for method in methods}
    failed: list[Cell] = []
    for _ in range(count):
        rates = {method: next_rate(method.rate, tried[method.name]) for method in methods}
        trials = {method: trials_of(method, rate) for method, rate in rates.items()}
        failed += laboratory.make_all([trial for same in zip(*trials.values(), strict=True) for trial in same])
        for method, rate in rates.items():
            found = [trial.result() for trial in trials[method]]
            tried[method.name][rate] = statistics.fmean(r["held_out_loss"] if r else math.inf for r in found)
    return tried, failed
