"""The demo: photos of a toybox subject, an adapter trained by the real command line, and a before/after picture.

    make demo

Writes outputs/demo/grid.png (the photos; then, scene by scene, the base and the base with the adapter at the same
seeds) and outputs/demo/report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import s2ft_diffusion  # noqa: F401  (gives pipelines their S2FT verbs)
from s2ft_diffusion import toybox
from s2ft_diffusion.text import forgive_streams
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS, Subject, write_photos

ROOT = Path(__file__).resolve().parent
TILE = 128
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 4.0}
TRAINING = [
    "--max_train_steps", "300", "--train_batch_size", "4", "--learning_rate", "5e-4", "--adapter_dtype", "float16",
]  # fmt: skip


def main() -> None:
    forgive_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=sorted(ALL_SUBJECTS), default="widget")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo")
    parser.add_argument("--seed", type=int, default=0, help="of the images; the next ones are the next columns'")
    parser.add_argument("trainer", nargs=argparse.REMAINDER, help="further flags for the trainer, after --")
    args = parser.parse_args()
    subject = ALL_SUBJECTS[args.subject]
    report = train(subject, args.output_dir, [flag for flag in args.trainer if flag != "--"])

    begun = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(toybox.base_path())
    pipe.set_progress_bar_config(disable=True)
    prompts = demo_prompts(subject)
    base = generate(pipe, prompts, args.seed)
    pipe.load_s2ft_weights(report["adapter"])
    adapted = generate(pipe, prompts, args.seed)
    report["seconds"]["generate"] = round(time.perf_counter() - begun, 2)

    grid = args.output_dir / "grid.png"
    draw_grid(subject, prompts, base, adapted).save(grid)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(f"{grid}: the photos, then the base and the adapter at the same seeds")
    print(json.dumps({key: report[key] for key in ("adapter", "adapter_bytes", "trainable", "share")}, indent=2))


def train(subject: Subject, output_dir: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Draw a subject's photos with captions, train an adapter by the command line; returns the trainer's report."""
    photos = output_dir / subject.name
    write_photos(subject.name, photos, captions=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1",
        str(ROOT / "train_dreambooth_s2ft.py"),
        "--pretrained_model_name_or_path", "toybox",
        "--instance_dir", str(photos),
        "--instance_prompt", subject.instance_prompt,
        "--output_dir", str(output_dir / "adapter"),
        "--overwrite_output_dir",
        *TRAINING,
        *flags,
    ]  # fmt: skip
    print("$", " ".join(["accelerate", "launch", *command[3:]]), flush=True)
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads((output_dir / "adapter" / "training.json").read_text(encoding="utf-8"))


def demo_prompts(subject: Subject) -> list[str]:
    """Six prompts: the four places that no photo shows, a crown, and a hat in one of the places."""
    return subject.prompts()[:6]


def generate(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """One image a prompt, each from a seed of its own."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(list(prompts), generator=generators, **SAMPLING).images


def draw_grid(
    subject: Subject, prompts: Sequence[str], base: list[Image.Image], adapted: list[Image.Image]
) -> Image.Image:
    """Three rows: the photos, the base, the adapter; over the latter two what each column's prompt says."""
    scenes = [prompt.removeprefix(subject.instance_prompt).strip() for prompt in prompts]
    rows = [
        ([f"the photos of {subject.name}"], subject.photos()),
        ([f"base: {scenes[0]}", *scenes[1:]], base),
        ([f"adapter: {scenes[0]}", *scenes[1:]], adapted),
    ]
    line, columns = 16, len(prompts)
    sheet = Image.new("RGB", (columns * TILE, len(rows) * (TILE + line)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for row, (texts, images) in enumerate(rows):
        top = row * (TILE + line)
        for column, text in enumerate(texts):
            draw.text((column * TILE + 2, top + 1), text, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image.resize((TILE - 2, TILE - 2), Image.Resampling.BICUBIC), (column * TILE, top + line))
    return sheet


if __name__ == "__main__":
    main()
