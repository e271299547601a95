"""`python -m eval compare`: S²FT beside full DreamBooth, LoRA, FourierFT and WaveFT, as in the paper's Table 3."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2ft_diffusion.dreambooth.errors import InputError

from .cells import Cell, open_laboratory
from .methods import BASE, METHODS, Method
from .plots import plot_bars, plot_losses, plot_sheet, plot_tradeoff
from .protocol import DEVELOPMENT, Subject, add_protocol_arguments, find_subjects, work_alone
from .rates import best_rate, next_rate
from .table import markdown, summarize

QUICK = {
    "steps": 60, "trials": 2, "seeds": 1, "images_per_prompt": 2, "sampling_steps": 10, "drift_images": 1,
    "development": DEVELOPMENT[:1], "subjects": ("mittens", "salty"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "outputs/compare")
    add = parser.add_argument
    add("--methods", nargs="+", choices=[m.name for m in METHODS if m.trains], help="by default all")
    add("--trials", type=int, default=5, help="learning rates that every method may try")
    add("--quick", action="store_true", help="a small version of everything, in ten minutes on two CPU cores")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, picture and score all cells that are not finished, and write the report; returns it.

    With several processes (`accelerate launch`, or the same command in another terminal), each takes what no other is
    at. Raises InputError or EncoderError before anything is trained.
    """
    if args.quick:
        for name, value in QUICK.items():
            setattr(args, name, value if not args.subjects_dir or name not in ("development", "subjects") else None)
    first = work_alone(args)
    if args.trials < 1:
        raise InputError(f"--trials must be at least 1, got {args.trials}.")
    development, subjects = find_subjects(args)
    laboratory = open_laboratory(args)
    methods = [m for m in METHODS if m.trains and (not args.methods or m.name in args.methods)]

    def cell(method: Method, rate: float, subject: Subject, seed: int) -> Cell:
        return Cell(args.output_dir, method, rate, subject, seed)

    bases = laboratory.make_bases(args.output_dir, [*subjects, *development])[: len(subjects)]
    failed: list[Cell] = []
    trials: dict[str, dict[float, float]] = {method.name: {} for method in methods}
    for _ in range(args.trials):
        rates = {method: next_rate(method.rate, trials[method.name]) for method in methods}
        failed += laboratory.make_all([cell(m, r, s, 0) for s in development for m, r in rates.items()])
        for method, rate in rates.items():
            found = [(cell(method, rate, s, 0), cell(BASE, 0.0, s, 0)) for s in development]
            trials[method.name][rate] = statistics.fmean(merit(*pair) for pair in found)
    chosen = {m.name: best_rate(trials[m.name]) for m in methods}
    cells = [cell(m, chosen[m.name], s, n) for n in range(args.seeds) for s in subjects for m in methods]
    failed += laboratory.make_all(cells)
    if not first:
        return {}
    found = summarize([BASE, *methods], [*bases, *cells])
    found = {
        "command": shlex.join(["python", "-m", "eval", *sys.argv[1:]]),
        "protocol": asdict(laboratory.protocol), "development": [s.name for s in development],
        "subjects": [s.name for s in subjects], "seeds": args.seeds, **found, "trials": trials, "rates": chosen,
        "failed": [{"cell": str(c), "error": c.failure()} for c in failed],
    }  # fmt: skip
    write_report(args.output_dir, found)
    plot_losses(cells, methods, args.output_dir / "losses.png")
    for subject in subjects:
        rows = [c for c in (*bases, *cells) if c.subject == subject and c.seed == 0]
        plot_sheet(subject, rows, laboratory.protocol, args.output_dir / f"sheet-{subject.name}.png")
    print((args.output_dir / "compare.md").read_text(encoding="utf-8"))
    for item in found["failed"]:
        print(f"failed, to be tried again by the next call: {item['cell']}: {item['error']}", file=sys.stderr)
    return found


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


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """`compare.json`, `compare.md` and the plots that are made from it."""
    (folder / "compare.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(markdown(found, METHODS[-1].name) + "\n", encoding="utf-8")
    plot_bars(found, folder / "bars.png")
    plot_tradeoff(found, folder / "tradeoff.png")
