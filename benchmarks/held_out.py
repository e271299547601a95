"""What the recipe learns of subjects on an embedded base: its loss on pictures of them that it was not shown.

    python -m benchmarks.held_out --base toybox-flow --subjects mittens dash perk --json docs/results/held-out.json \\
        --flags "--targets all --max_train_steps 200 --train_batch_size 4 --learning_rate 4e-4 --seed 0"

Each subject's photos go through `train_dreambooth_s2ft.py` as a process of its own. The pictures are of scenes that no
photo shows, under prompts that name those scenes; losses have the same noise and times before and after. Below 1 the
adapter has learned what the subject looks like, above 1 its photos by heart. "scenes" is the share of images, made by
the same prompts, in which the probe reads the scene that was asked for. What is in `--output_dir` already is not
trained again: let runs with and without `--captions` have different ones.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from eval.generation import make_images, picturing, read_images, sampling_for
from eval.subjects import Subject, toy_subject
from eval.training import Run, Session
from s2ft_diffusion.adapters.file import WEIGHTS_NAME
from s2ft_diffusion.families import Family
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.toybox.check import load_probe
from s2ft_diffusion.toybox.check import read_images as look
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS, write_photos
from s2ft_diffusion.toybox.world import BACKGROUNDS

from .measure import parser, report

RECIPE = Path(__file__).resolve().parents[1] / "train_dreambooth_s2ft.py"
IMAGES = 5  # of each scene


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--base", choices=("toybox", "toybox-flow"), default="toybox")
    arguments.add_argument("--subjects", nargs="+", choices=ALL_SUBJECTS, default=["mittens", "dash", "perk"])
    arguments.add_argument("--flags", default="", help="of the recipe, in one string")
    arguments.add_argument("--captions", action="store_true", help="beside each photo: what scene it shows")
    arguments.add_argument("--output_dir", type=Path, default=Path("outputs/held-out"))
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.subjects:
        subject = toy_subject(name, args.output_dir)
        write_photos(name, subject.photos, captions=args.captions)
        adapter = trained(args.base, subject, args.output_dir / f"{args.base}-{name}", shlex.split(args.flags))
        before, after, scenes = measured(args.base, subject, adapter, args.device)
        rows.append(
            {"base": args.base, "subject": name, "before": before, "after": after, "relative": after / before,
             "scenes": scenes}
        )  # fmt: skip
    mean = {key: statistics.fmean(row[key] for row in rows) for key in ("before", "after", "relative", "scenes")}
    report("held_out", args, [*rows, {"base": args.base, "subject": "mean", **mean}])


def trained(base: str, subject: Subject, output: Path, flags: list[str]) -> Path:
    """The folder with the adapter that the recipe makes of a subject's photos."""
    if not (output / WEIGHTS_NAME).exists():
        command = [sys.executable, str(RECIPE), "--pretrained_model_name_or_path", base]
        command += ["--instance_dir", str(subject.photos), "--instance_prompt", prompt(subject)]
        subprocess.run([*command, "--output_dir", str(output), *flags], check=True)
    return output


def measured(base: str, subject: Subject, adapter: Path, device: str) -> tuple[float, float, float]:
    """The loss on the subject's pictures elsewhere, of the base and with the adapter; and the share of scenes."""
    session = Session(Run(base, subject.photos, prompt(subject), 0, 1, held_out=subject.elsewhere), device=device)
    before = session.held_out_loss()
    session.base.pipeline.load_s2ft_weights(adapter)
    return before, session.held_out_loss(), scenes_read(session.base, base, subject, adapter / "scenes")


def scenes_read(base: Family, name: str, subject: Subject, folder: Path) -> float:
    """The share of images of new scenes in which the probe reads the scene that was asked for."""
    asked = {f"{prompt(subject)} {words}": scene for scene, words in BACKGROUNDS.items()}
    asked = {text: scene for text, scene in asked.items() if scene not in subject.toy.photo_backgrounds()}
    wanted = [(text, seed) for text in asked for seed in range(IMAGES)]
    make_images(picturing(base), folder, wanted, sampling_for(name, None, None, None), "scenes", IMAGES)
    images = [image for text in asked for image in read_images(folder, text, range(IMAGES))]
    seen = look(load_probe(), images)["background"]
    return statistics.fmean(asked[text] == scene for (text, _), scene in zip(wanted, seen, strict=True))


def prompt(subject: Subject) -> str:
    return f"a photo of {UNSEEN_TOKEN} {subject.class_name}"


if __name__ == "__main__":
    main()
