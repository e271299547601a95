"""`python -m eval score`: how good one adapter is."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState

from s2ft_diffusion import AdapterFileError, toybox
from s2ft_diffusion.dreambooth.base import find_family
from s2ft_diffusion.dreambooth.folders import check_apart, check_outside
from s2ft_diffusion.dreambooth.images import find_images, load_image
from s2ft_diffusion.dreambooth.settings import BaseSettings
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.pipelines.sources import find_adapter_file, read_any_adapter
from s2ft_diffusion.text import printable
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN

from .encoders import CLIP, DINO, LPIPS, TOYBOX, Encoders, load_encoders
from .generation import claim, generate, load_pipeline, read_images, sampling_for
from .prompts import Prompt, check_all_read, drift_prompts, read_templates, toybox_templates
from .scores import Scores, add_drift, contact_sheet, markdown, score_images, score_real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, help="adapter file, folder, or name on the hub")
    add("--subject_dir", type=Path, required=True, help="folder of the subject's photos")
    add("--base", default="toybox", help="base: hub id, folder, toybox, or toybox-flow")
    add(
        "--prompts",
        type=Path,
        help="DreamBench's prompts_and_classes.txt, or one prompt a line; {0}: token, {1}: class",
    )
    add("--class_name", help="the subject's class; by default the adapter's")
    add("--token", default=UNSEEN_TOKEN, help="the unique token the adapter was trained with")
    add("--images_per_prompt", type=int, default=4)
    add("--steps", type=int, help="by default 25 for an embedded base, else its pipeline's own")
    add("--guidance", type=float, default=None, help="by default 4 for an embedded base, else its pipeline's own")
    add("--resolution", type=int, help="by default the base's own")
    add("--output_dir", type=Path, default=Path("outputs/scores"))
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of generation; by default float16 on a GPU")
    add_encoder_arguments(parser)


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dino", help=f"ViT for transformers, or toybox; by default {DINO}; on an embedded base, toybox")
    add("--clip", help=f"open_clip model, or toybox; by default {CLIP}; on an embedded base, toybox")
    add("--lpips", help=f"alex, vgg, squeeze or toybox; by default {LPIPS}; on an embedded base, toybox")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train and generate")
    add("--batch_size", type=int, default=32, help="images that the encoders see at once")
    add("--features", type=Path, help="folder to keep features in; by default features/ in the output folder")


def check_device(device: str) -> None:
    """Raise InputError for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


OWN_FOLDERS = ("adapter", "base", "features")  # in the output folder, each written to at any depth


def features_folder(args: argparse.Namespace) -> Path | None:
    """Where features are kept, if the command keeps any."""
    return (args.features or args.output_dir / "features") if hasattr(args, "features") else None


def check_folders(args: argparse.Namespace, photos: Mapping[str, Path], own: Sequence[str]) -> None:
    """Raise InputError where a command would write among the photos that it reads, or into a model's folder.

    `photos` are folders by what a message calls them, `own` what the command makes in its output folder.
    """
    written = {"--output_dir": args.output_dir, "--features": features_folder(args)}
    check_apart(photos, written)
    named = {f"--{name}": getattr(args, name, None) for name in ("base", "dino", "clip")}
    models = {name: Path(toybox.resolve(value)) for name, value in named.items() if value}
    adapter = {"--adapter": Path(args.adapter) if getattr(args, "adapter", None) else None}
    made = {f"{name}/ of --output_dir": args.output_dir / name for name in own}
    check_outside({**photos, **models, **adapter}, made)
    check_outside(written, models)


def encoders_for(args: argparse.Namespace, device: str) -> Encoders:
    """The encoders that the arguments ask for."""
    toy = toybox.is_embedded(args.base)
    return load_encoders(
        args.dino or (TOYBOX if toy else DINO),
        args.clip or (TOYBOX if toy else CLIP),
        args.lpips or (TOYBOX if toy else LPIPS),
        device=device,
        batch_size=args.batch_size,
        cache=features_folder(args),
    )


def run(args: argparse.Namespace) -> dict[str, Scores]:
    """Generate, score, and write `scores.json`, `scores.md` and `sheet.png`; returns the table's rows.

    Raises InputError, AdapterFileError or EncoderError before anything is generated.
    """
    for name in ("images_per_prompt", "steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        raise InputError(f"--resolution must be a multiple of 8, got {args.resolution}.")
    check_device(args.device)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise InputError(f"--output_dir {args.output_dir} is no folder.")
    check_folders(args, {"--subject_dir": args.subject_dir}, OWN_FOLDERS)
    state = PartialState(cpu=args.device == "cpu")
    real = [load_image(path) for path in find_images(args.subject_dir)]
    try:
        path = find_adapter_file(args.adapter)
        adapter = read_any_adapter(path, find_family(BaseSettings(args.base))[0].denoiser)
    except OSError as error:
        raise InputError(str(error)) from None
    class_name = args.class_name or adapter.info.class_name
    if not class_name:
        raise InputError("The adapter does not say what its subject is; say it with --class_name.")
    templates = read_templates(args.prompts, class_name) if args.prompts else toybox_templates()
    prompts = list(dict.fromkeys(Prompt.fill(template, args.token, class_name) for template in templates))
    away = drift_prompts(class_name)
    check_all_read(args.base, [*(prompt.text for prompt in prompts), *away], f"{args.token} {class_name}")
    sampling = sampling_for(args.base, args.steps, args.guidance, args.resolution)
    encoders = encoders_for(args, args.device)
    dtype = getattr(torch, args.dtype or ("float16" if args.device.startswith("cuda") else "float32"))
    pipe = load_pipeline(args.base, args.device, dtype)
    pipe.load_s2ft_weights(path)  # now, to see whether it fits
    pipe.unload_s2ft_weights()
    common = {"base": args.base, "dtype": str(dtype), **asdict(sampling)}
    own, base = args.output_dir / "adapter", args.output_dir / "base"
    if state.is_main_process:
        claim(own, {**common, "adapter": hashlib.sha256(path.read_bytes()).hexdigest()})
        claim(base, common)
    state.wait_for_everyone()
    seeds = range(args.images_per_prompt)
    generate(pipe, base, away, seeds, sampling, "base")
    pipe.load_s2ft_weights(path)
    generate(pipe, own, [prompt.text for prompt in prompts], seeds, sampling, "adapter")
    generate(pipe, own, away, seeds, sampling, "drift")
    if not state.is_main_process:
        return {}
    made = {prompt: read_images(own, prompt.text, seeds) for prompt in prompts}
    name = adapter.info.subject or printable(path.stem)
    rows = {
        "real photos": score_real(encoders, real, made[prompts[0]][0].width),
        name: score_images(encoders, real, made),
    }
    before, after = ([image for prompt in away for image in read_images(f, prompt, seeds)] for f in (base, own))
    add_drift(rows[name], encoders, before, after)
    table = markdown(rows, encoders.names)
    facts = {
        "adapter": str(args.adapter), "adapter_bytes": path.stat().st_size, "trainable": adapter.trainable,
        "images": sum(map(len, made.values())), "encoders": encoders.names, "sampling": common,
        "rows": {key: scores.to_json() for key, scores in rows.items()},
        "prompts": {
            prompt.text: score_images(encoders, real, {prompt: images}).to_json() for prompt, images in made.items()
        },
    }  # fmt: skip
    text = printable(json.dumps(facts, indent=1, ensure_ascii=False))
    (args.output_dir / "scores.json").write_text(text, encoding="utf-8")
    (args.output_dir / "scores.md").write_text(table + "\n", encoding="utf-8")
    contact_sheet([real, *made.values()], args.output_dir / "sheet.png")
    print(table)
    print(f"\n{args.output_dir}/scores.json, scores.md, sheet.png")
    return rows


ERRORS = (InputError, AdapterFileError)
