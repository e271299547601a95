"""Whose photos are learned: folders of one's own, or the toybox's subjects."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from s2ft_diffusion.dreambooth.images import find_images, load_image
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.text import printable
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS, SUBJECTS, write_pictures
from s2ft_diffusion.toybox.subjects import Subject as ToySubject

from .prompts import read_classes
from .score import check_folders

OWN_FOLDERS = ("cells", "features", "priors", "trials")
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


def prompt_file(args: argparse.Namespace) -> Path | None:
    """DreamBench's `prompts_and_classes.txt` where the subjects are one's own; None where they are the toybox's."""
    return args.prompts or (args.subjects_dir and args.subjects_dir / "prompts_and_classes.txt")


def find_subjects(args: argparse.Namespace) -> tuple[list[Subject], list[Subject]]:
    """The development subjects and those to compare on. Raises InputError for names that are not there."""
    known: dict[str, Subject] = {}
    if args.subjects_dir is None:
        check_folders(args, {}, OWN_FOLDERS)
        names, usual = list(ALL_SUBJECTS), list(SUBJECTS)
    else:
        if not args.subjects_dir.is_dir():
            raise InputError(f"--subjects_dir {args.subjects_dir}: there is no such folder.")
        prompts = prompt_file(args)
        classes = read_classes(prompts)
        known = {
            path.name: Subject(path.name, classes[printable(path.name)], path)
            for path in sorted(args.subjects_dir.iterdir())
            if path.is_dir() and printable(path.name) in classes
        }
        photos = {f"the photos of {subject.name}": subject.photos for subject in known.values()}
        check_folders(args, photos, OWN_FOLDERS)
        for subject in known.values():
            find_images(subject.photos)
        if len(known) < 2:
            raise InputError(f"{args.subjects_dir}: fewer than two folders are named as subjects of {prompts}.")
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
