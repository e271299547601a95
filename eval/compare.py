"""`python -m eval compare`: S²FT beside full DreamBooth, LoRA, FourierFT and WaveFT, as in the paper's Table 3."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from s2ft_diffusion.dreambooth.errors import InputError
from s2ft_diffusion.dreambooth.images import find_images
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.toybox.subjects import SUBJECTS, write_photos

from .cells import Cell, Laboratory, Protocol, Subject
from .generation import Sampling, claim
from .methods import BASE, METHODS, Method
from .plots import plot_bars, plot_losses, plot_sheet, plot_tradeoff
from .prompts import read_classes
from .rates import best_rate, next_rate
from .score import add_encoder_arguments, encoders_for
from .statistics import mean_and_error, paired_difference

DEVELOPMENT = ("perk", "trek")
METRICS = ("dino", "clip_i", "clip_t", "lpips", "drift", "drift_clip")
_SCORE_NAMES = {"drift": "drift_lpips"}
QUICK = {
    "steps": 60, "trials": 2, "seeds": 1, "images_per_prompt": 2, "sampling_steps": 10, "drift_images": 1,
    "development": DEVELOPMENT[:1], "subjects": ("mittens", "salty"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", default="toybox", help="Stable Diffusion base: hub id, folder, or toybox")
    add_subject_arguments(parser)
    add("--methods", nargs="+", choices=[m.name for m in METHODS if m.trains], help="by default all")
    add("--trials", type=int, default=5, help="learning rates that every method may try")
    add("--seeds", type=int, default=2, help="trainings of every method on every subject")
    add("--n_frequency", default="0.02", help="S²FT's numbers a layer, or a share; the other sizes follow from it")
    add("--targets", choices=("qv", "attention"), default="qv")
    add("--steps", type=int, default=300, help="training steps")
    add("--batch", type=int, default=4, help="images a training step")
    add("--resolution", type=int, help="by default the base's own")
    add("--token", default=UNSEEN_TOKEN, help="the unique token")
    add("--images_per_prompt", type=int, default=4)
    add("--drift_images", type=int, default=2, help="images a prompt that does not name the subject")
    add("--sampling_steps", type=int, default=20)
    add("--guidance", type=float, help="by default 4 for toybox, 7.5 else")
    add("--quick", action="store_true", help="a small version of everything, in ten minutes on two CPU cores")
    add("--output_dir", type=Path, default=Path("outputs/compare"))
    add_encoder_arguments(parser)


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--subjects_dir", type=Path, help="a folder of photos for each subject; by default the toybox's subjects")
    add("--prompts", type=Path, help="DreamBench's prompts_and_classes.txt; by default the one in --subjects_dir")
    add("--development", nargs="+", help="subjects to choose on, learning rates for example")
    add("--subjects", nargs="+", help="subjects to report on; by default all others")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, picture and score all cells that are not finished, and write the report; returns it.

    With several processes (`accelerate launch`, or the same command in another terminal), each takes what no other is
    at. Raises InputError or EncoderError before anything is trained.
    """
    if args.quick:
        for name, value in QUICK.items():
            setattr(args, name, value if not args.subjects_dir or name not in ("development", "subjects") else None)
    first = work_alone(args)
    for name in ("trials", "seeds", "steps", "batch", "images_per_prompt", "drift_images", "sampling_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    development, subjects = find_subjects(args)
    encoders = encoders_for(args)
    protocol = make_protocol(args, encoders.names)
    claim(args.output_dir, json.loads(json.dumps(asdict(protocol))))
    laboratory = Laboratory(protocol, encoders, args.device)
    methods = [m for m in METHODS if m.trains and (not args.methods or m.name in args.methods)]

    def cell(method: Method, rate: float, subject: Subject, seed: int) -> Cell:
        return Cell(args.output_dir, method, rate, subject, seed)

    def report(done: Cell, what: str) -> None:
        print(f"{done}: {what}", flush=True)

    bases = [cell(BASE, 0.0, subject, 0) for subject in (*development, *subjects)]
    failed = laboratory.make_all(bases, report)
    if failed:  # nothing can be said about the others without them
        raise RuntimeError(f"{failed[0]} failed: {failed[0].failure()}")
    trials: dict[str, dict[float, float]] = {method.name: {} for method in methods}
    for _ in range(args.trials):
        rates = {method: next_rate(method.rate, trials[method.name]) for method in methods}
        failed += laboratory.make_all([cell(m, r, s, 0) for s in development for m, r in rates.items()], report)
        for method, rate in rates.items():
            found = [(cell(method, rate, s, 0), cell(BASE, 0.0, s, 0)) for s in development]
            trials[method.name][rate] = statistics.fmean(merit(*pair) for pair in found)
    chosen = {m.name: best_rate(trials[m.name]) for m in methods}
    cells = [cell(m, chosen[m.name], s, n) for n in range(args.seeds) for s in subjects for m in methods]
    failed += laboratory.make_all(cells, report)
    if not first:
        return {}
    bases = [cell(BASE, 0.0, subject, 0) for subject in subjects]
    found = summarize([BASE, *methods], [*bases, *cells])
    found = {
        "command": shlex.join(["python", "-m", "eval", *sys.argv[1:]]),
        "protocol": asdict(protocol), "development": [s.name for s in development],
        "subjects": [s.name for s in subjects], "seeds": args.seeds, **found, "trials": trials, "rates": chosen,
        "failed": [{"cell": str(c), "error": c.failure()} for c in failed],
    }  # fmt: skip
    write_report(args.output_dir, found)
    plot_losses(cells, methods, args.output_dir / "losses.png")
    for subject in subjects:
        rows = [c for c in (*bases, *cells) if c.subject == subject and c.seed == 0]
        plot_sheet(subject, rows, protocol, args.output_dir / f"sheet-{subject.name}.png")
    print((args.output_dir / "compare.md").read_text(encoding="utf-8"))
    for item in found["failed"]:
        print(f"failed, to be tried again by the next call: {item['cell']}: {item['error']}", file=sys.stderr)
    return found


def work_alone(args: argparse.Namespace) -> bool:
    """Take this process out of the group that `accelerate launch` would make of it; whether it is the first one.

    Each training is one process's own: its gradients must not be summed with those of another training. On GPUs each
    process takes its own one.
    """
    first = int(os.environ.pop("RANK", "0")) == 0
    local = os.environ.pop("LOCAL_RANK", None)
    os.environ.pop("WORLD_SIZE", None)
    if args.device == "cuda" and local is not None:
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    return first


def find_subjects(args: argparse.Namespace) -> tuple[list[Subject], list[Subject]]:
    """The development subjects and those to compare on. Raises InputError for names that are not there."""
    if args.subjects_dir is None:
        folder = args.output_dir / "subjects"
        known = {}
        for name, subject in SUBJECTS.items():
            if not (folder / name).exists():
                temporary = folder / f".{name}-{os.getpid()}"
                write_photos(name, temporary)
                try:
                    temporary.rename(folder / name)
                except OSError:  # another process was faster
                    for path in temporary.iterdir():
                        path.unlink()
                    temporary.rmdir()
            known[name] = Subject(name, subject.kind, folder / name)
    else:
        if not args.subjects_dir.is_dir():
            raise InputError(f"--subjects_dir {args.subjects_dir}: there is no such folder.")
        args.prompts = args.prompts or args.subjects_dir / "prompts_and_classes.txt"
        classes = read_classes(args.prompts)
        known = {
            path.name: Subject(path.name, classes[path.name], path)
            for path in sorted(args.subjects_dir.iterdir())
            if path.is_dir() and path.name in classes
        }
        for subject in known.values():
            find_images(subject.photos)
        if len(known) < 2:
            raise InputError(f"{args.subjects_dir}: fewer than two folders are named as subjects of {args.prompts}.")
    default = list(DEVELOPMENT) if args.subjects_dir is None else list(known)[:1]
    development = args.development or default
    subjects = args.subjects or [name for name in known if name not in development]
    for name in (*development, *subjects):
        if name not in known:
            raise InputError(f"There is no subject {name!r}; there are {', '.join(known)}.")
    if both := set(development) & set(subjects):
        raise InputError(f"Learning rates must be chosen on other subjects than are compared: {sorted(both)}.")
    return [known[name] for name in development], [known[name] for name in subjects]


def make_protocol(args: argparse.Namespace, encoders: dict[str, str]) -> Protocol:
    """What all cells share, from the arguments."""
    toy = args.base == "toybox"
    guidance = args.guidance if args.guidance is not None else 4.0 if toy else 7.5
    return Protocol(
        base=args.base,
        token=args.token,
        n_frequency=amount(args.n_frequency),
        targets=args.targets,
        steps=args.steps,
        batch=args.batch,
        resolution=args.resolution,
        prompt_file=str(args.prompts) if args.prompts else None,
        images_per_prompt=args.images_per_prompt,
        drift_images=args.drift_images,
        sampling=Sampling(args.sampling_steps, guidance, args.resolution),
        encoders=tuple(encoders.items()),
    )


def amount(text: str) -> int | float:
    """Numbers a layer: a count, or a share of d * k below 1. Raises InputError for anything else."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise InputError(f"--n_frequency must be a count or a share such as 0.02, got {text!r}.") from None


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


def summarize(methods: Sequence[Method], cells: Iterable[Cell]) -> dict[str, Any]:
    """Rows of the table, paired differences of every two methods, and the numbers of every cell."""
    found = [(cell, result) for cell in cells if (result := cell.result()) is not None]
    rows, values = [], {}
    for method in methods:
        own = [(cell, result) for cell, result in found if cell.method == method]
        if not own:
            continue
        row: dict[str, Any] = {"method": method.name, "title": method.title, "cells": len(own)}
        for name in ("trainable", "share", "bytes", "seconds", "peak_mb"):
            row[name] = statistics.median(result[name] for _, result in own)
        for metric in METRICS:
            scores = {
                (cell.subject.name, cell.seed): result["scores"][_SCORE_NAMES.get(metric, metric)]
                for cell, result in own
            }
            row[metric] = mean_and_error(list(scores.values()))
            values[method.name, metric] = scores
        rows.append(row)
    real = {cell.subject.name: result["real"] for cell, result in found}
    names = [row["method"] for row in rows if row["method"] != BASE.name]
    paired = [
        {"a": a, "b": b, "metric": metric, **paired_difference(values[a, metric], values[b, metric])}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for metric in METRICS
    ]
    kept = ("rate", "subject", "seed", "trainable", "bytes", "seconds", "peak_mb", "scores")
    return {
        "rows": rows,
        "real": {m: mean_and_error([r[m] for r in real.values()]) for m in ("dino", "clip_i", "lpips")},
        "paired": paired,
        "cells": [{"method": c.method.name, **{key: result[key] for key in kept}} for c, result in found],
    }


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """`compare.json`, `compare.md` and the plots that are made from it."""
    (folder / "compare.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(markdown(found) + "\n", encoding="utf-8")
    plot_bars(found, folder / "bars.png")
    plot_tradeoff(found, folder / "tradeoff.png")


HEADS = {
    "dino": "DINO ↑", "clip_i": "CLIP-I ↑", "clip_t": "CLIP-T ↑", "lpips": "LPIPS ↑", "drift": "drift ↓",
}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """The table of a report, and the differences of S²FT's default from every other method."""
    lines = [
        "| method | " + " | ".join(HEADS.values()) + " | trainable | share | file | seconds | memory |",
        "| --- |" + " --- |" * (len(HEADS) + 5),
    ]
    real = {metric: f"{_plain(found['real'].get(metric))}" for metric in HEADS}
    lines.append("| real photos | " + " | ".join(real.values()) + " | | | | | |")
    for row in found["rows"]:
        sizes = (
            f"{row['trainable']:,.0f} | {row['share']:.2%} | {row['bytes'] / 1e3:,.0f} kB | {row['seconds']:.0f} | "
            f"{row['peak_mb']:.0f} MB"
            if row["trainable"]
            else "0 | | | |"
        )
        lines.append(f"| {row['title']} | " + " | ".join(_plain(row[m]) for m in HEADS) + f" | {sizes} |")
    titles = {row["method"]: row["title"] for row in found["rows"]}
    own = METHODS[-1].name
    if own in titles:
        lines += ["", f"{titles[own]}, minus (95 % interval; bold where it excludes zero):", ""]
        lines += ["| | " + " | ".join(HEADS.values()) + " |", "| --- |" + " --- |" * len(HEADS)]
        for other in titles:
            if other in (own, BASE.name):
                continue
            cells = [_difference(found["paired"], own, other, metric) for metric in HEADS]
            lines.append(f"| {titles[other]} | " + " | ".join(cells) + " |")
    counts = f"{len(found['subjects'])} subjects, {found['seeds']} seeds each; mean ± standard error over trainings"
    rates = ", ".join(f"{titles[name]} {rate:.1e}" for name, rate in found["rates"].items() if name in titles)
    used = ", ".join(f"{key.upper()}: {name}" for key, name in found["protocol"]["encoders"])
    lines += ["", f"{counts}. Learning rates: {rates}. Drift by LPIPS. Encoders: {used}."]
    if found["failed"]:
        lines += ["", f"{len(found['failed'])} trainings failed and are not in the table."]
    return "\n".join(lines)


def _plain(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (f" ± {value['stderr']:.3f}" if value["stderr"] is not None else "")


def _difference(paired: list[dict], a: str, b: str, metric: str) -> str:
    for entry in paired:
        if entry["metric"] == metric and {entry["a"], entry["b"]} == {a, b}:
            sign = 1 if entry["a"] == a else -1
            if entry["low"] is None:
                return f"{sign * entry['mean']:+.3f}"
            low, high = sorted((sign * entry["low"], sign * entry["high"]))
            text = f"{sign * entry['mean']:+.3f} ({low:+.3f} … {high:+.3f})"
            return f"**{text}**" if low > 0 or high < 0 else text
    return "–"
