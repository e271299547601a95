"""The sweep behind the trainer's default learning rate, scaling and steps, on the embedded base.

    python -m benchmarks.learning_rate --json docs/results/learning-rate.json

For each preset, learning rate and development subject the real trainer runs, and the adapter is judged by losses with
fixed noise, relative to the base's:

* `photos`: on the instance images; it falls with any fitting, memorising included.
* `unseen`: on pictures of the subject in scenes that its photos do not show, under prompts that name those scenes; this
  is what an adapter is for, and what chooses the rate.
* `others`: on ordinary pictures under ordinary captions; above 1 the adapter has made the base forget.

Runs that are in the JSON file already are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

import s2ft_diffusion  # noqa: F401
import train_dreambooth_s2ft as recipe
from s2ft_diffusion import toybox
from s2ft_diffusion.toybox.captions import describe
from s2ft_diffusion.toybox.networks import to_tensor
from s2ft_diffusion.toybox.subjects import SUBJECTS, Subject
from s2ft_diffusion.toybox.world import random_scene, render
from s2ft_diffusion.tuner.seeding import seeded

PRESETS = ("default", "paper")
DEVELOPMENT = ("perk", "trek")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 3_000_000
DRAWS = 8


def pictures(subject: Subject) -> dict[str, list[tuple[Image.Image, str]]]:
    """Pictures with prompts, by what a loss on them means."""
    unseen = [(picture, f"{subject.instance_prompt} {place}") for picture, place in subject.pictures_elsewhere()]
    ordinary = [random_scene(random.Random(HELD_OUT + i)) for i in range(12)]
    return {
        "photos": [(photo, subject.instance_prompt) for photo in subject.photos()],
        "unseen": unseen,
        "others": [(render(scene), describe(scene)) for scene in ordinary],
    }


@torch.no_grad()
def losses(pipe: StableDiffusionPipeline, subject: Subject) -> dict[str, float]:
    """Mean denoising losses with noise and timesteps that are the same in every call."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    result = {}
    for name, pairs in pictures(subject).items():
        images, prompts = zip(*pairs, strict=True)
        latents = pipe.vae.encode(to_tensor(list(images))).latent_dist.mode() * pipe.vae.config.scaling_factor
        context, _ = pipe.encode_prompt(list(prompts), "cpu", 1, False)
        values = []
        for draw in range(DRAWS):
            noise = torch.randn(latents.shape, generator=seeded(subject.name, name, draw))
            steps = torch.full((len(latents),), int((draw + 0.5) / DRAWS * 1000))
            target = scheduler.get_velocity(latents, noise, steps)
            predicted = pipe.unet(scheduler.add_noise(latents, noise, steps), steps, context).sample
            values.append(float((predicted - target).square().mean()))
        result[name] = float(np.mean(values))
    return result


@contextmanager
def trained(subject: Subject, preset: str, rate: float, steps: int, flags: list[str]) -> Iterator[Path]:
    """An adapter that the real trainer made, in a folder that goes away afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / subject.name
        photos.mkdir()
        for i, photo in enumerate(subject.photos()):
            photo.save(photos / f"{i}.png")
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        recipe.main(
            [
                "--pretrained_model_name_or_path",
                "toybox",
                "--instance_dir",
                str(photos),
                "--instance_prompt",
                subject.instance_prompt,
                "--output_dir",
                f"{folder}/out",
                "--preset",
                preset,
                "--learning_rate",
                str(rate),
                "--max_train_steps",
                str(steps),
                "--report_to",
                "none",
                *flags,
            ]
        )
        yield Path(folder) / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("docs/results/learning-rate.json"))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--label", default="", help="names a variant given by further flags")
    parser.add_argument("--rates", nargs="+", type=float, help="instead of the built-in ones")
    args, flags = parser.parse_known_args()
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    done = {(row["preset"], row["label"], row["subject"], row["rate"], row["steps"]) for row in rows}
    pipe = StableDiffusionPipeline.from_pretrained(toybox.base_path())
    base = {name: losses(pipe, SUBJECTS[name]) for name in DEVELOPMENT}
    for preset in args.presets:
        for rate in args.rates or RATES:
            for name in DEVELOPMENT:
                if (preset, args.label, name, rate, args.steps) in done:
                    continue
                with trained(SUBJECTS[name], preset, rate, args.steps, flags) as output:
                    pipe.load_s2ft_weights(output)
                    report = json.loads((output / "training.json").read_text())
                found = losses(pipe, SUBJECTS[name])
                pipe.unload_s2ft_weights()
                relative = {key: round(value / base[name][key], 4) for key, value in found.items()}
                rows.append(
                    {
                        "preset": preset,
                        "label": args.label,
                        "subject": name,
                        "rate": rate,
                        "steps": args.steps,
                        **relative,
                        "trainable": report["trainable"],
                        "seconds": report["seconds"]["train"],
                    }
                )
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'preset':10}{'label':14}{'steps':>6}{'rate':>9}{'photos':>9}{'unseen':>9}{'others':>9}")

    def cell(row: dict) -> tuple:
        return row["preset"], row["label"], row["steps"], row["rate"]

    for preset, label, steps, rate in sorted({cell(row) for row in rows}):
        part = [row for row in rows if cell(row) == (preset, label, steps, rate)]
        means = "".join(f"{np.mean([row[key] for row in part]):9.3f}" for key in ("photos", "unseen", "others"))
        print(f"{preset:10}{label:14}{steps:6}{rate:9.1e}{means}")


if __name__ == "__main__":
    main()
