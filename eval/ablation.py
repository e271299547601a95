"""`python -m eval ablation`: S²FT's options, one changed at a time (the paper's Tables 6, 7 and 9, and its Figure 6).

But for those that vary it, all have the same number of real trainable numbers. Each has its own learning rate, from the
same number of trials: what moves more with every step wants a lower one. Scores of images vary more between seeds than
most options are worth, the loss on unseen pictures much less: `--seeds 0` leaves the images out.
"""

from __future__ import annotations

import argparse
from typing import Any

from .methods import METHODS, Method, s2ft
from .protocol import add_protocol_arguments, made_quick
from .rates import STEP
from .study import run_study
from .subjects import DEVELOPMENT
from .table import markdown, markdown_of_trials

# Group, then what each variant changes in the default preset or its estimate.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "sampling": {"random": {"sampling": "random"}, "low frequency": {"sampling": "low_frequency"}},
    # A dense grid draws nothing: these are for free positions, whose default, gamma 2, is "positions: free".
    "free": {
        **{name: {"positions": "free", "sampling": name.replace(" ", "_")} for name in ("random", "low frequency")},
        "the largest": {"positions": "free", "sampling": "top"},
        **{f"gamma {g:g}": {"positions": "free", "gamma": g} for g in (0.5, 1.0, 1.5, 3.0, 5.0)},
    },
    "n": {f"n {n}": {"n_frequency": n} for n in (0.0004, 0.0008, 0.0032, 0.0064)},
    # As many in all as the default's 0.0016 of each layer's weights have on the toybox.
    "spread": {"the same number in each layer": {"n_frequency": 171}},
    "prior": {
        "gradient": {"estimate": "gradient"},
        "normalized": {"estimate": "normalized"},
        # One step a draw of each of the toybox's six photos.
        **{f"{6 * n} steps": {"estimate_draws": n} for n in (2, 4, 24)},
    },
    "positions": {
        "free": {"positions": "free"},
        **{f"oversampling {m}": {"oversampling": m} for m in (4, 8)},
        "oversampling 4, the largest": {"oversampling": 4, "sampling": "top"},
    },
    "coefficients": {"real": {"positions": "free", "coefficients": "real"}},
    "norm": {"backward": {"positions": "free", "norm": "backward", "scaling": 100.0}},
    "rearrangement": {
        "none": {"rearrange": "none"},
        "Euclidean": {"distance": "euclidean"},
        "no signs": {"signs": False},
        "no 2-opt": {"refine": None},
    },
}
RATE = METHODS[-1].rate
DEFAULT = s2ft("ablation-default", "default", RATE)


QUICK = {
    "seeds": 1, "trials": 1, "steps": 40, "images_per_prompt": 2, "sampling_steps": 8, "drift_images": 1,
    "development": DEVELOPMENT[:1], "subjects": ("mittens",),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "outputs/ablation", trials=2)
    parser.add_argument("--groups", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="few steps and images, one subject and seed")


def methods(groups: list[str]) -> list[Method]:
    """The default and all variants of some groups."""
    found = [DEFAULT]
    for group in groups:
        for title, options in VARIANTS[group].items():
            name = f"{group}-{title}".replace(" ", "-").replace(",", "")
            # The search goes down first, and free positions want a higher rate than a grid does.
            rate = RATE * STEP if options.get("positions") == "free" else RATE
            found.append(s2ft(name, f"{group}: {title}", rate, **options))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what is not done yet, and write the table; returns the report, {} where another process writes it.

    Raises InputError or EncoderError before anything is trained.
    """
    if args.quick:
        args = made_quick(args, add_arguments, QUICK)
    study = run_study(args, methods(args.groups), beside=DEFAULT.name)
    if study is None:
        return {}
    table = markdown if args.seeds else markdown_of_trials
    study.write("ablation", table(study.report, DEFAULT.name))
    return study.report
