"""What the trainings of a comparison share: subjects, settings, and the arguments that say them."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from s2ft_diffusion.dreambooth.arguments import amount
from s2ft_diffusion.dreambooth.errors import InputError
from s2ft_diffusion.dreambooth.folders import check_apart
from s2ft_diffusion.dreambooth.images import find_images, load_image
from s2ft_diffusion.pipelines.targets import TARGETS
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS, SUBJECTS, write_pictures
from s2ft_diffusion.toybox.subjects import Subject as ToySubject
from s2ft_diffusion.tuner.config import S2FTConfig

from .generation import Sampling, sampling_for
from .prompts import Prompt, check_all_read, drift_prompts, read_classes, read_templates, toybox_templates
from .score import add_encoder_arguments
from .training import Run

DEVELOPMENT = ("perk", "trek", "bolt")


@dataclass(frozen=True)
class Subject:
    """Whose photos are learned: the folder they lie in, and the class.

    `elsewhere` are pictures of it that are not among the photos, each with the words that its scene adds to the prompt.
    `toy` can draw it in any scene.
    """

    name: str
    class_name: str
    photos: Path
    elsewhere: tuple[tuple[Path, str], ...] = ()
    toy: ToySubject | None = None

    def held_out(self) -> tuple[tuple[Path, str], ...]:
        """What a trial is judged by: the pictures of it elsewhere, or else a third of its photos.

        Those are then not trained on, and no words say what else is to be seen in them.
        """
        photos = find_images(self.photos)
        return self.elsewhere or tuple((path, "") for path in photos[-max(1, len(photos) // 3) :])

    def real(self) -> list[Image.Image]:
        """Its photos."""
        return [load_image(path) for path in find_images(self.photos)]


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
    add("--trial_seeds", type=int, default=1, help="trainings on every development subject for each of them")
    add(
        "--n_frequency",
        type=amount,
        default=0.0016,
        help="S²FT's numbers a layer, or a share; other sizes follow",
    )
    add("--targets", choices=TARGETS, default="all")
    add("--steps", type=int, default=300, help="training steps")
    add("--batch", type=int, default=4, help="images a training step")
    add("--resolution", type=int, help="by default the base's own")
    add("--token", default=UNSEEN_TOKEN, help="the unique token")
    add("--images_per_prompt", type=int, default=4)
    add("--drift_images", type=int, default=2, help="images a prompt that does not name the subject")
    add("--sampling_steps", type=int, default=20)
    add("--guidance", type=float, help="by default 4 for an embedded base, else its pipeline's own")
    add("--output_dir", type=Path, default=Path(output_dir))
    add_encoder_arguments(parser)


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--subjects_dir", type=Path, help="a folder of photos for each subject; by default the toybox's subjects")
    add("--prompts", type=Path, help="DreamBench's prompts_and_classes.txt; by default the one in --subjects_dir")
    add("--development", nargs="+", help="subjects to choose on, learning rates for example")
    add(
        "--subjects",
        nargs="+",
        help="subjects to report on; by default all others (of the toybox's first twelve)",
    )


def make_quick(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], small: Mapping[str, Any]
) -> None:
    """Take the values of a small version for every argument that was left at its default.

    Subjects of one's own are not among the small version's.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    for name, value in small.items():
        own = args.subjects_dir is not None and name in ("development", "subjects")
        if not own and getattr(args, name) == defaults[name]:
            setattr(args, name, value)


def find_subjects(args: argparse.Namespace) -> tuple[list[Subject], list[Subject]]:
    """The development subjects and those to compare on. Raises InputError for names that are not there."""
    known: dict[str, Subject] = {}
    if args.subjects_dir is None:
        names, usual = list(ALL_SUBJECTS), list(SUBJECTS)
    else:
        if not args.subjects_dir.is_dir():
            raise InputError(f"--subjects_dir {args.subjects_dir}: there is no such folder.")
        args.prompts = args.prompts or args.subjects_dir / "prompts_and_classes.txt"
        classes = read_classes(args.prompts)
        known = {
            path.name: Subject(path.name, classes[path.name], path)
            for path in sorted(args.subjects_dir.iterdir())
            if path.is_dir() and path.name in classes
        }
        for subject in known.values():
            check_apart({f"the photos of {subject.name}": subject.photos}, {"--output_dir": args.output_dir})
            find_images(subject.photos)
        if len(known) < 2:
            raise InputError(f"{args.subjects_dir}: fewer than two folders are named as subjects of {args.prompts}.")
        names = usual = list(known)
    default = list(DEVELOPMENT) if args.subjects_dir is None else names[:1]
    development = list(dict.fromkeys(args.development or default))
    subjects = list(dict.fromkeys(args.subjects or [name for name in usual if name not in development]))
    for name in (*development, *subjects):
        if name not in names:
            raise InputError(f"There is no subject {name!r}; there are {', '.join(names)}.")
    if both := set(development) & set(subjects):
        raise InputError(f"Learning rates must be chosen on other subjects than are compared: {sorted(both)}.")
    if args.subjects_dir is None:
        known = {name: toy_subject(name, args.output_dir) for name in (*development, *subjects)}
    return [known[name] for name in development], [known[name] for name in subjects]


def toy_subject(name: str, folder: Path) -> Subject:
    """A toybox subject, its pictures in files."""
    toy = ALL_SUBJECTS[name]
    elsewhere = toy.pictures_elsewhere()
    photos = _write_once(toy.photos(), folder / "subjects" / name)
    paths = find_images(_write_once([picture for picture, _ in elsewhere], folder / "elsewhere" / name))
    captioned = tuple((path, words) for path, (_, words) in zip(paths, elsewhere, strict=True))
    return Subject(name, toy.kind, photos, captioned, toy)


def _write_once(pictures: Sequence[Image.Image], folder: Path) -> Path:
    """Write pictures into a folder that is there only when it is complete; several processes may do so at once."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        write_pictures(pictures, temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return folder


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
        prompt_file=str(args.prompts) if args.prompts else None,
        images_per_prompt=args.images_per_prompt,
        drift_images=args.drift_images,
        sampling=sampling_for(args.base, args.sampling_steps, args.guidance, args.resolution),
        encoders=tuple(encoders.items()),
    )


def work_alone(args: argparse.Namespace) -> bool:
    """Take this process out of the group that `accelerate launch` would make of it; whether it is the first one.

    Each training is one process's own: its gradients must not be summed with those of another training. On GPUs each
    process takes its own one.
    """
    first = int(os.environ.pop("RANK", "0")) == 0
    local = os.environ.pop("LOCAL_RANK", None)
    os.environ.pop("WORLD_SIZE", None)
    if args.device == "cuda" and local is not None:
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    return first
