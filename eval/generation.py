"""Images for prompts and seeds, each in a file of its own, so that what is finished is not made again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from s2ft_diffusion import toybox
from s2ft_diffusion.dreambooth.base import find_family
from s2ft_diffusion.dreambooth.settings import BaseSettings
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.families import FAMILIES, Family
from s2ft_diffusion.families.loading import load_pipeline as pipeline_of
from s2ft_diffusion.tuner.seeding import seeded


@dataclass(frozen=True)
class Sampling:
    """How images are made from a prompt and a seed."""

    steps: int = 25
    guidance: float = 4.0
    resolution: int | None = None


def sampling_for(base: str, steps: int | None, guidance: float | None, resolution: int | None) -> Sampling:
    """What is not given is as usual: for the embedded bases, else for the base's family. Raises InputError."""
    if guidance is not None and not 0 <= guidance < math.inf:
        raise InputError(f"--guidance must be a finite number of at least 0, got {guidance}.")
    usual = Sampling()
    if not toybox.is_embedded(base):
        family = find_family(BaseSettings(base))[0].sampling()
        usual = Sampling(family.steps, family.guidance)
    return Sampling(steps or usual.steps, usual.guidance if guidance is None else guidance, resolution)


def load_pipeline(base: str, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The base's pipeline, as `picturing` makes it. Raises InputError if it cannot be loaded."""
    family, _ = find_family(BaseSettings(base))
    return picturing(family(pipeline_of(toybox.resolve(base), family, dtype).to(device)))


def picturing(base: Family) -> DiffusionPipeline:
    """A loaded base's pipeline, quiet, with the scheduler that images are compared by."""
    pipe = base.pipeline
    if base.compared_by is not None:
        pipe.scheduler = getattr(diffusers, base.compared_by).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_path(folder: Path, prompt: str, seed: int) -> Path:
    """Where the image of a prompt and a seed lies: in a folder of the prompt's words, and a hash of all of it."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return folder / f"{slug}-{digest}".lstrip("-") / f"{seed:03d}.png"


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say in the folder what its images depend on; raises InputError if it holds images of something else."""
    path = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder}: holds images made with other settings; choose another --output_dir, or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def generate(
    pipe: DiffusionPipeline,
    folder: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    description: str,
) -> None:
    """Make every image that is not there yet; with several processes, each makes its share.

    Images are made one by one from their own seeds: an image does not depend on the others, nor on who makes it.
    """
    state = PartialState()
    missing = [(p, s) for p in prompts for s in seeds if not image_path(folder, p, s).exists()]
    state.wait_for_everyone()  # until all have listed, nobody writes: else their shares would not be of one list
    with state.split_between_processes(missing) as own:
        make_images(pipe, folder, own, sampling, description)
    state.wait_for_everyone()


@torch.no_grad()
def make_images(
    pipe: DiffusionPipeline,
    folder: Path,
    wanted: Sequence[tuple[str, int]],
    sampling: Sampling,
    description: str,
    batch_size: int = 1,
) -> None:
    """Make the images of prompts and seeds, `batch_size` at once, in this process."""
    family = FAMILIES[type(pipe).__name__]
    options = family.call(steps=sampling.steps, guidance=sampling.guidance, side=sampling.resolution)
    with tqdm(total=len(wanted), desc=description, unit="image", disable=not wanted, mininterval=1) as bar:
        for i in range(0, len(wanted), batch_size):
            batch = wanted[i : i + batch_size]
            made = pipe(
                prompt=[prompt for prompt, _ in batch],
                **options,
                generator=[seeded("eval", prompt, seed) for prompt, seed in batch],
            ).images
            for (prompt, seed), image in zip(batch, made, strict=True):
                write_image(image, image_path(folder, prompt, seed))
                bar.update()


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file that is there only when it is complete."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(temporary, "PNG")
    temporary.replace(path)


def read_images(folder: Path, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
    """A prompt's images, in the order of the seeds."""
    found = []
    for seed in seeds:
        with Image.open(image_path(folder, prompt, seed)) as image:
            found.append(image.convert("RGB"))
    return found
