"""What the trainings of a comparison share, and the arguments that say it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2ft_diffusion.dreambooth.arguments import amount
from s2ft_diffusion.dreambooth.environment import process_count
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.pipelines.targets import TARGETS
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.tuner.config import S2FTConfig

from .generation import Sampling, sampling_for
from .prompts import Prompt, check_all_read, drift_prompts, read_templates, toybox_templates
from .score import add_encoder_arguments
from .subjects import Subject, add_subject_arguments, prompt_file
from .training import Run


@dataclass(frozen=True)
class Protocol:
    """What all cells of a comparison share."""

    base: str
    token: str
    n_frequency: int | float
    targets: str
    steps: int
    batch: int
    resolution: int | None
    prompt_file: str | None
    images_per_prompt: int
    drift_images: int
    sampling: Sampling
    encoders: tuple[tuple[str, str], ...]

    def prompts(self, subject: Subject) -> list[Prompt]:
        """The prompts that a subject is pictured under."""
        file = self.prompt_file
        templates = read_templates(Path(file), subject.class_name) if file else toybox_templates()
        return list(dict.fromkeys(Prompt.fill(t, self.token, subject.class_name) for t in templates))

    def instance_prompt(self, subject: Subject) -> str:
        return f"a photo of {self.token} {subject.class_name}"

    def check_prompts(self, subjects: Iterable[Subject]) -> None:
        """Raise InputError for a prompt at whose end the base would not read the subject's words."""
        for subject in subjects:
            texts = [prompt.text for prompt in self.prompts(subject)]
            texts += [self.instance_prompt(subject), *drift_prompts(subject.class_name)]
            check_all_read(self.base, texts, f"{self.token} {subject.class_name}")

    def run(self, subject: Subject, seed: int) -> Run:
        """The training run of a subject and a seed."""
        prompt = self.instance_prompt(subject)
        return Run(
            self.base, subject.photos, prompt, seed, self.n_frequency, self.targets, self.steps, self.batch,
            self.resolution,
        )  # fmt: skip


def add_protocol_arguments(parser: argparse.ArgumentParser, output_dir: str, trials: int = 5) -> None:
    """What every comparison by trained cells takes."""
    add = parser.add_argument
    add("--base", default="toybox", help="base: hub id, folder, toybox, or toybox-flow")
    add_subject_arguments(parser)
    add("--seeds", type=int, default=2, help="trainings on every subject that is reported on")
    add("--trials", type=int, default=trials, help="learning rates that every method may try")
    add("--trial_seeds", type=int, default=1, help="trainings on every development subject at the best of them")
    add(
        "--n_frequency",
        type=amount,
        default=0.0016,
        help="S²FT's numbers a layer, or a share; other sizes follow",
    )
    add("--targets", choices=TARGETS, default="all", help="layers that are adapted")
    add("--steps", type=int, default=300, help="training steps")
    add("--batch", type=int, default=4, help="images a training step")
    add("--resolution", type=int, help="by default the base's own")
    add("--token", default=UNSEEN_TOKEN, help="the unique token")
    add("--images_per_prompt", type=int, default=4, help="images of each prompt and training")
    add("--drift_images", type=int, default=2, help="images a prompt that does not name the subject")
    add("--sampling_steps", type=int, default=20, help="denoising steps of an image")
    add("--guidance", type=float, help="by default 4 for an embedded base, else its pipeline's own")
    add("--output_dir", type=Path, default=Path(output_dir), help="where everything goes")
    add_encoder_arguments(parser)


def made_quick(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], small: Mapping[str, Any]
) -> argparse.Namespace:
    """The arguments with the values of a small version wherever one was left at its default.

    Subjects of one's own are not among the small version's.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given, defaults = vars(args), vars(parser.parse_args([]))
    own = ("development", "subjects") if args.subjects_dir is not None else ()
    taken = {name: value for name, value in small.items() if name not in own and given[name] == defaults[name]}
    return argparse.Namespace(**given | taken)


def make_protocol(args: argparse.Namespace, encoders: dict[str, str]) -> Protocol:
    """What all cells share, from the arguments. Raises InputError for counts below one."""
    for name in ("steps", "batch", "images_per_prompt", "drift_images", "sampling_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    try:
        S2FTConfig(n_frequency=args.n_frequency)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Protocol(
        base=args.base,
        token=args.token,
        n_frequency=args.n_frequency,
        targets=args.targets,
        steps=args.steps,
        batch=args.batch,
        resolution=args.resolution,
        prompt_file=str(file) if (file := prompt_file(args)) else None,
        images_per_prompt=args.images_per_prompt,
        drift_images=args.drift_images,
        sampling=sampling_for(args.base, args.sampling_steps, args.guidance, args.resolution),
        encoders=tuple(encoders.items()),
    )


def own_process(device: str) -> tuple[bool, str]:
    """Take this process out of the group that `accelerate launch` would make of it.

    Each training is one process's own: its gradients must not be summed with those of another training.

    Returns:
        whether it is the first one, and its device: on GPUs each process takes its own one.

    Raises:
        InputError: for a variable of theirs that is no number.
    """
    process_count()
    first = int(os.environ.pop("RANK", "0")) == 0
    local = os.environ.pop("LOCAL_RANK", None)
    os.environ.pop("WORLD_SIZE", None)
    if device == "cuda" and local is not None:
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    return first, device
