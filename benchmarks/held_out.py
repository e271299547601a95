"""What the recipe learns of subjects on an embedded base: its loss on pictures of them that it was not shown.

    python -m benchmarks.held_out --base toybox-flow --subjects mittens dash perk --json docs/results/held-out.json \\
        --flags "--targets all --max_train_steps 200 --train_batch_size 4 --learning_rate 4e-4 --seed 0"

Each subject's photos go through `train_dreambooth_s2ft.py` as a process of its own. The pictures are of scenes that no
photo shows, under prompts that name those scenes; losses have the same noise and times before and after. Below 1 the
adapter has learned what the subject looks like, above 1 its photos by heart. What is in `--output_dir` already is not
trained again.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from eval.subjects import Subject, toy_subject
from eval.training import Run, Session
from s2ft_diffusion.adapters.file import WEIGHTS_NAME
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS

from .measure import parser, report

RECIPE = Path(__file__).resolve().parents[1] / "train_dreambooth_s2ft.py"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--base", choices=("toybox", "toybox-flow"), default="toybox")
    arguments.add_argument("--subjects", nargs="+", choices=ALL_SUBJECTS, default=["mittens", "dash", "perk"])
    arguments.add_argument("--flags", default="", help="of the recipe, in one string")
    arguments.add_argument("--output_dir", type=Path, default=Path("outputs/held-out"))
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.subjects:
        subject = toy_subject(name, args.output_dir)
        adapter = trained(args.base, subject, args.output_dir / f"{args.base}-{name}", shlex.split(args.flags))
        before, after = losses(args.base, subject, adapter, args.device)
        rows.append({"base": args.base, "subject": name, "before": before, "after": after, "relative": after / before})
    mean = {key: statistics.fmean(row[key] for row in rows) for key in ("before", "after", "relative")}
    report("held_out", args, [*rows, {"base": args.base, "subject": "mean", **mean}])


def trained(base: str, subject: Subject, output: Path, flags: list[str]) -> Path:
    """The folder with the adapter that the recipe makes of a subject's photos."""
    if not (output / WEIGHTS_NAME).exists():
        command = [sys.executable, str(RECIPE), "--pretrained_model_name_or_path", base]
        command += ["--instance_dir", str(subject.photos), "--instance_prompt", prompt(subject)]
        subprocess.run([*command, "--output_dir", str(output), *flags], check=True)
    return output


def losses(base: str, subject: Subject, adapter: Path, device: str) -> tuple[float, float]:
    """The loss on the subject's pictures elsewhere, of the base and with the adapter."""
    session = Session(Run(base, subject.photos, prompt(subject), 0, 1, held_out=subject.elsewhere), device=device)
    before = session.held_out_loss()
    session.base.pipeline.load_s2ft_weights(adapter)
    return before, session.held_out_loss()


def prompt(subject: Subject) -> str:
    return f"a photo of {UNSEEN_TOKEN} {subject.class_name}"


if __name__ == "__main__":
    main()
