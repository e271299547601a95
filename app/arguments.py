"""The app's flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from s2ft_diffusion import toybox
from s2ft_diffusion.dreambooth.folders import check_outside
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.families import FAMILIES
from s2ft_diffusion.families.loading import check_offload
from s2ft_diffusion.families.quantization import QUANTIZATIONS, check_quantization
from s2ft_diffusion.text import HelpFormatter, as_argument, decode_arguments, decoded

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Browse S2FT adapters, generate with them, compare, train and look inside.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("models").add_argument
    add(
        "--base",
        default="toybox",
        help="hub id or folder of a base, or 'toybox' or 'toybox-flow', the embedded ones; known pipelines: "
        + ", ".join(sorted(FAMILIES)),
    )
    add("--adapters", nargs="*", default=[], help="folders, files and hub ids of adapters")
    add("--outputs", type=Path, default=ROOT / "outputs" / "app", help="where images, uploads and trainings are kept")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to generate")
    add("--quantize", choices=QUANTIZATIONS, help="hold the base's linear layers in 4 or 8 bits")
    add("--offload", action="store_true", help="keep the base's blocks in host memory; they visit the device in turn")
    add("--dtype", choices=tuple(DTYPES), help="by default float32 on a CPU, float16 elsewhere")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every network")
    add("--port", type=int, default=7860, help="port to listen on; 0 for any that is free")
    add("--root_path", help="path under which a proxy serves the app, such as /s2ft")
    add("--share", action="store_true", help="a public link through Gradio's servers")
    add("--auth", help="user:password, or a file with one of those a line")
    add("--concurrency", type=int, default=1, help="generations at once; each has a pipeline of its own in memory")
    add("--max_queue", type=int, default=32, help="requests that may wait")
    add("--max_upload_mb", type=int, default=20, help="size of one uploaded file")
    add("--no_training", action="store_true", help="leave out the Train tab")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check; errors end the program with one line and exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        decode_arguments(args, paths=vars(args), secrets=("auth",))
    except InputError as error:
        parser.error(str(error))
    for name in ("concurrency", "max_queue", "max_upload_mb"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        if args.quantize:
            check_quantization(args.quantize)
        if args.offload:
            check_offload(args.quantize)
    except InputError as error:
        parser.error(str(error))
    if args.concurrency > 1 and (args.quantize or args.offload):
        parser.error("--concurrency must be 1 with --quantize or --offload: the base's models are not copied")
    own = {f"{name}/ of --outputs": args.outputs / name for name in ("adapters", "history", "trainings")}
    base = {"--base": Path(toybox.resolve(args.base))}
    uploads = {"adapters/ of --outputs, where visitors may delete": args.outputs / "adapters"}
    try:
        check_outside({f"--adapters {source}": Path(source) for source in args.adapters}, uploads)
        check_outside(base, own)
        check_outside({"--outputs": args.outputs}, base)
    except InputError as error:
        parser.error(str(error))
    args.dtype = DTYPES[args.dtype] if args.dtype else torch.float32 if args.device == "cpu" else torch.float16
    try:
        args.outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--outputs {args.outputs} cannot be written: {error.strerror}")
    try:
        args.auth = read_auth(args.auth) if args.auth else None
    except ValueError as error:
        parser.error(str(error))
    return args


def read_auth(value: str) -> list[tuple[str, str]]:
    """User names and passwords from "user:password" or a file; raises ValueError for anything else."""
    path = Path(as_argument(value))
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [decoded(value)]
    pairs = [tuple(line.split(":", 1)) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError("--auth wants user:password, or a file with one of those a line")
    return pairs
