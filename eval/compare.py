"""`python -m eval compare`: S²FT beside full DreamBooth, LoRA, OFT, FourierFT and WaveFT, as in the paper's Table 3."""

from __future__ import annotations

import argparse
from typing import Any

from .methods import METHODS
from .plots import plot_bars, plot_differences, plot_losses, plot_sheet
from .protocol import add_protocol_arguments, made_quick
from .study import run_study
from .subjects import DEVELOPMENT
from .table import markdown, markdown_of_trials

QUICK = {
    "steps": 60, "trials": 1, "seeds": 1, "images_per_prompt": 2, "sampling_steps": 10, "drift_images": 1,
    "development": DEVELOPMENT[:1], "subjects": ("mittens",), "methods": ("lora", "fourierft", "s2ft-default"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "outputs/compare")
    add = parser.add_argument
    add("--methods", nargs="+", choices=[m.name for m in METHODS], help="by default all")
    add(
        "--quick",
        action="store_true",
        help="three methods on one subject in minutes: that it runs, not which is better",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what is not done yet, and write table and plots; returns the report, {} where another process writes it.

    Raises InputError or EncoderError before anything is trained.
    """
    if args.quick:
        args = made_quick(args, add_arguments, QUICK)
    methods = [m for m in METHODS if not args.methods or m.name in args.methods]
    study = run_study(args, methods)
    if study is None:
        return {}
    if not args.seeds:  # by the loss on unseen pictures alone
        study.write("compare", markdown_of_trials(study.report, METHODS[-1].name))
        return study.report
    study.write("compare", markdown(study.report, METHODS[-1].name))
    plot_bars(study.report, args.output_dir / "bars.png")
    plot_differences(study.report, METHODS[-1].name, args.output_dir / "differences.png")
    plot_losses(study.cells, methods, args.output_dir / "losses.png")
    for subject in study.subjects:
        rows = [c for c in (*study.references, *study.cells) if c.subject == subject and c.seed == 0]
        plot_sheet(subject, rows, study.protocol, args.output_dir / f"sheet-{subject.name}.png")
    return study.report
