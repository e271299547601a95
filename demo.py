"""The demo: photos of a toybox subject, an adapter trained by the real command line, and a before/after grid.

    make demo

Writes outputs/demo/grid.png (the photos; then, prompt by prompt, the base and the base with the adapter at the same
seeds) and outputs/demo/report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import s2ft_diffusion  # noqa: F401  (gives pipelines their S2FT verbs)
from s2ft_diffusion import toybox
from s2ft_diffusion.toybox.subjects import SUBJECTS, Subject, write_photos

ROOT = Path(__file__).resolve().parent
TILE = 112
COLUMNS = 6
PROMPTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=sorted(SUBJECTS), default="mittens")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("trainer", nargs=argparse.REMAINDER, help="further flags for the trainer, after --")
    args = parser.parse_args()
    subject = SUBJECTS[args.subject]
    photos = args.output_dir / subject.name
    write_photos(subject.name, photos)

    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "1",
        str(ROOT / "train_dreambooth_s2ft.py"),
        "--pretrained_model_name_or_path", "toybox",
        "--instance_dir", str(photos),
        "--instance_prompt", subject.instance_prompt,
        "--output_dir", str(args.output_dir / "adapter"),
        "--overwrite_output_dir",
        "--max_train_steps", str(args.max_train_steps),
        "--train_batch_size", "4",
        *[flag for flag in args.trainer if flag != "--"],
    ]  # fmt: skip
    print("$", " ".join(["accelerate", *command[1:]]), flush=True)
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    report = json.loads((args.output_dir / "adapter" / "training.json").read_text())

    begun = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(toybox.base_path())
    pipe.set_progress_bar_config(disable=True)
    prompts = subject.prompts()[: PROMPTS + 1]
    before = [generate(pipe, prompt) for prompt in prompts]
    pipe.load_s2ft_weights(report["adapter"])
    pipe.fuse_s2ft()
    after = [generate(pipe, prompt) for prompt in prompts]
    report["seconds"]["generate"] = round(time.perf_counter() - begun, 2)

    grid = args.output_dir / "grid.png"
    draw_grid(subject, prompts, before, after).save(grid)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2))
    print(f"{grid}: the photos, then the base and the adapter at the same seeds")
    print(json.dumps({key: report[key] for key in ("adapter", "adapter_bytes", "trainable", "share")}, indent=2))


def generate(pipe: StableDiffusionPipeline, prompt: str) -> list[Image.Image]:
    """One row: the same seeds for every prompt, before and after."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(COLUMNS)]
    options = {"num_inference_steps": 25, "guidance_scale": 4.0, "generator": generators}
    return pipe([prompt] * COLUMNS, **options).images


def draw_grid(
    subject: Subject, prompts: list[str], before: list[list[Image.Image]], after: list[list[Image.Image]]
) -> Image.Image:
    """Rows of pictures with a line of text over each."""
    rows = [(f"the photos of {subject.name}, a {subject.kind}", subject.photos())]
    for prompt, base, adapted in zip(prompts, before, after, strict=True):
        rows += [(f"{prompt} - base", base), (f"{prompt} - with the adapter", adapted)]
    line = 16
    sheet = Image.new("RGB", (COLUMNS * TILE, len(rows) * (TILE + line)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, (text, images) in enumerate(rows):
        top = row * (TILE + line)
        draw.text((2, top + 1), text, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image.resize((TILE - 2, TILE - 2), Image.Resampling.BICUBIC), (column * TILE, top + line))
    return sheet


if __name__ == "__main__":
    main()
