"""Command line of the toybox: python -m s2ft_diffusion.toybox render|subjects|pretrain|check."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from . import NAMES, resolve
from .subjects import ALL_SUBJECTS, write_photos


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s2ft_diffusion.toybox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="write a subject's photos to a folder")
    render.add_argument("subject", choices=sorted(ALL_SUBJECTS))
    render.add_argument("folder", type=Path)
    commands.add_parser("subjects", help="list the subjects, their classes and prompts")
    pretrain = commands.add_parser("pretrain", help="train the bases from nothing; resumes from its work folder")
    pretrain.add_argument("--work_dir", type=Path, default=Path("runs/toybox"), help="checkpoints and logs")
    pretrain.add_argument("--output_dir", type=Path, help="where base/ and flow/ go; by default WORK_DIR/bases")
    pretrain.add_argument("--bases", nargs="+", choices=("unet", "flow"), default=("unet", "flow"))
    pretrain.add_argument("--start", help="train this base's denoiser on instead: toybox, toybox-flow, or a folder")
    pretrain.add_argument("--device", default=None, help="cuda or cpu; by default a GPU where there is one")
    pretrain.add_argument("--scenes", type=int, help="pictures to render")
    pretrain.add_argument("--workers", type=int, help="processes that render; by default one a core")
    pretrain.add_argument("--batch", type=int, help="samples a step of the denoisers")
    for stage in ("autoencoder", "text", "unet", "transformer"):
        pretrain.add_argument(f"--{stage}_steps", dest=stage, type=int, metavar="STEPS")
    pretrain.add_argument("--no_compile", dest="compile", action="store_false", help="run steps as they are written")
    check = commands.add_parser("check", help="measure the bases: reconstruction, and a probe on what they generate")
    check.add_argument("bases", nargs="*", default=list(NAMES), help="names or folders; by default both embedded ones")
    check.add_argument("--images", type=int, default=504, help="images of prompts that say everything")
    check.add_argument("--open_images", type=int, default=200, help="images of prompts that leave the colour open")
    check.add_argument("--work_dir", type=Path, default=Path("runs/toybox-check"))
    args = parser.parse_args()
    if args.command == "render":
        paths = write_photos(args.subject, args.folder)
        print(f"{len(paths)} photos of {args.subject}, a {ALL_SUBJECTS[args.subject].kind}, in {args.folder}")
    elif args.command == "subjects":
        for subject in ALL_SUBJECTS.values():
            print(f"{subject.name:10} {subject.kind:10} {subject.instance_prompt}")
    elif args.command == "pretrain":
        import torch

        from .pretraining import Plan, pretrain, pretrain_further

        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        names = ("scenes", "workers", "batch", "autoencoder", "text", "unet", "transformer")
        given = {name: getattr(args, name) for name in names if getattr(args, name)}
        plan = replace(Plan.for_device(device), compile=args.compile, **given)
        output_dir = args.output_dir or args.work_dir / "bases"
        if args.start:
            pretrain_further(args.work_dir, Path(resolve(args.start)), output_dir, plan, device)
        else:
            pretrain(args.work_dir, output_dir, plan, device, args.bases)
    else:
        from .check import check_base

        for name in args.bases:
            report = check_base(Path(resolve(name)), args.images, args.open_images, args.work_dir)
            print(name, json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
