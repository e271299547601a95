"""`python -m eval ablation`: S²FT's options, one changed at a time (the paper's Tables 6, 7 and 9).

But for those that vary it, all have the same number of real trainable numbers; and all have one learning rate.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from typing import Any

from s2ft_diffusion.dreambooth.errors import InputError

from .cells import Cell, open_laboratory
from .methods import BASE, Method
from .protocol import add_protocol_arguments, find_subjects, work_alone
from .table import markdown, summarize

# Group, then each variant's flags for the trainer, on top of the default preset.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sampling": {
        "random": ("--sampling", "random"),
        "low frequency": ("--sampling", "low_frequency"),
        "the largest": ("--sampling", "top"),
    },
    "gamma": {f"gamma {g}": ("--gamma", g) for g in ("0.5", "1", "2", "3", "5")},
    "n": {f"n {n}": ("--n_frequency", n) for n in ("0.005", "0.01", "0.04", "0.08")},
    "prior": {
        "gradient": ("--estimate", "gradient"),
        "normalized": ("--estimate", "normalized"),
        # One step a draw of each of the toybox's six photos.
        **{f"{6 * draws} steps": ("--estimate_draws", str(draws)) for draws in (1, 2, 4, 24)},
    },
    "coefficients": {"real": ("--coefficients", "real")},
    "norm": {"backward": ("--norm", "backward", "--scaling", "100")},
    "rearrangement": {
        "none": ("--rearrange", "none"),
        "Euclidean": ("--distance", "euclidean"),
        "no signs": ("--signs", "no"),
        "no 2-opt": ("--refine", "none"),
    },
}
DEFAULT = Method("ablation-default", "default", "s2ft", flags=("--preset", "default"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "outputs/ablation")
    parser.add_argument("--groups", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="of all variants")
    parser.add_argument("--quick", action="store_true", help="few steps and images, one subject and seed")


def methods(groups: list[str]) -> list[Method]:
    """The default and all variants of some groups."""
    found = [DEFAULT]
    for group in groups:
        for title, flags in VARIANTS[group].items():
            name = f"{group}-{title}".replace(" ", "-").replace(",", "")
            found.append(Method(name, f"{group}: {title}", "s2ft", flags=("--preset", "default", *flags)))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, picture and score what is not finished, and write `ablation.json` and `ablation.md`; returns the report.

    Shares its work between processes as `compare` does. Raises InputError or EncoderError before anything is trained.
    """
    if args.quick:
        args.seeds, args.steps, args.images_per_prompt, args.sampling_steps, args.drift_images = 1, 40, 2, 8, 1
        args.subjects = args.subjects or (None if args.subjects_dir else ["mittens"])
    first = work_alone(args)
    if not args.learning_rate > 0:
        raise InputError(f"--learning_rate must be above 0, got {args.learning_rate}.")
    _, subjects = find_subjects(args)
    laboratory = open_laboratory(args)

    bases = laboratory.make_bases(args.output_dir, subjects)
    chosen = methods(args.groups)
    cells = [
        Cell(args.output_dir, method, args.learning_rate, subject, seed)
        for seed in range(args.seeds)
        for subject in subjects
        for method in chosen
    ]
    failed = laboratory.make_all(cells)
    if not first:
        return {}
    found = {
        "command": shlex.join(["python", "-m", "eval", *sys.argv[1:]]),
        "protocol": asdict(laboratory.protocol), "subjects": [s.name for s in subjects], "seeds": args.seeds,
        **summarize([BASE, *chosen], [*bases, *cells], beside=DEFAULT.name),
        "rates": {"ablation-default": args.learning_rate},
        "failed": [{"cell": str(c), "error": c.failure()} for c in failed],
    }  # fmt: skip
    (args.output_dir / "ablation.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    table = markdown(found, DEFAULT.name)
    (args.output_dir / "ablation.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    for item in found["failed"]:
        print(f"failed, to be tried again by the next call: {item['cell']}: {item['error']}", file=sys.stderr)
    return found
