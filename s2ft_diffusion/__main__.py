"""Adapters on the command line: python -m s2ft_diffusion info|convert|merge|add|extract|verify (or s2ft ...)."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from .text import decode_arguments, forgive_streams, printable

T = TypeVar("T")

EXAMPLES = """examples:
  s2ft info dog/
  s2ft convert dog/ dog.safetensors --to kohya
  s2ft merge base/ dog/ cat/:0.5 base-with-both/
  s2ft add dog/:0.8 cat/:0.5 both.safetensors --to comfyui
  s2ft extract lora.safetensors small/pytorch_s2ft_weights.safetensors --numbers 8000
  s2ft verify dog/ --base stable-diffusion-v1-5/
"""
SOURCE = "an S2FT file, or a folder with one or that PEFT's save_pretrained wrote"
BASE = 'the base model: a folder in diffusers\' layout, or "toybox"'


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="s2ft",
        description="S2FT adapter files: look at them, convert them for other tools, merge, add and extract.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what an adapter is: header, layers, numbers, ranks, energy by layer")
    info.add_argument("file", help=SOURCE)
    info.add_argument("--json", action="store_true", help="everything, as JSON")
    info.add_argument("--base", help=f"{BASE}; a FourierFT adapter needs it")

    convert = commands.add_parser("convert", help="an adapter for diffusers, PEFT, A1111, Forge, kohya or ComfyUI")
    convert.add_argument("file", help=f"{SOURCE}; also a FourierFT adapter that PEFT saved")
    convert.add_argument("out", help="the file to write; for peft, the folder")
    convert.add_argument(
        "--to",
        required=True,
        choices=("lora", "peft", "kohya", "comfyui", "s2ft"),
        help="lora: diffusers' load_lora_weights; peft: PeftModel.from_pretrained; kohya: A1111, Forge, sd-scripts and "
        "ComfyUI, for U-Nets; comfyui: ComfyUI and Forge, transformers too; s2ft: this package's file",
    )
    _add_precision(convert, "float16")
    _add_rank(convert)
    convert.add_argument(
        "--dense", action="store_true", help="whole weight changes instead of a LoRA: large, exact at free positions"
    )
    convert.add_argument("--base", help=f"{BASE}; tells convolutions from linear layers where the names do not")

    merge = commands.add_parser("merge", help="a copy of a base model with adapters in its weights")
    merge.add_argument("base", help=BASE)
    merge.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help=f"{SOURCE}, or a LoRA file")
    merge.add_argument("out", help="the folder to write; it must not exist")

    add = commands.add_parser("add", help="the weighted sum of adapters of one base as one LoRA, by concatenation")
    add.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help=f"{SOURCE}, or a LoRA file")
    add.add_argument("out", help="the LoRA file to write; for peft, the folder")
    add.add_argument("--to", default="lora", choices=("lora", "peft", "kohya", "comfyui"), help="default: lora")
    _add_precision(add, "float16", ("float32", "float16", "bfloat16"))
    _add_rank(add, "LoRA of each S2FT adapter")
    add.add_argument("--base", help=f"{BASE}; needed for LoRA files in kohya's names")

    extract = commands.add_parser("extract", help="a LoRA file as an S2FT adapter on a grid")
    extract.add_argument("file", help="a LoRA file of diffusers, kohya or ComfyUI, or a folder of PEFT's")
    extract.add_argument("out", help="the S2FT file to write")
    extract.add_argument(
        "--numbers", type=_numbers, default=8000, help="numbers in each layer, or a share below 1; default: 8000"
    )
    extract.add_argument(
        "--oversampling", type=int, default=1, help="places of the grid for each number kept; default: 1, all are kept"
    )
    _add_precision(extract, "float16")
    extract.add_argument("--base", help=f"{BASE}; needed for kohya's names")

    verify = commands.add_parser("verify", help="check that a file fits a base model; exit code 1 if it doesn't")
    verify.add_argument("file", help=f"{SOURCE}, or a LoRA file")
    verify.add_argument("--base", required=True, help=BASE)
    return made


def _add_precision(
    command: argparse.ArgumentParser, default: str, choices: Sequence[str] = ("float32", "float16", "bfloat16", "int8")
) -> None:
    command.add_argument("--dtype", default=default, choices=choices, help=f"of the numbers; default: {default}")


def _add_rank(command: argparse.ArgumentParser, what: str = "LoRA") -> None:
    command.add_argument("--rank", type=int, help=f"rank of the {what}; on a grid it is exact without")
    command.add_argument(
        "--error", type=float, help="the largest relative error of a layer; the smallest rank within it is taken"
    )


def _numbers(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or a share such as 0.01, got {text!r}") from None


def weighted(text: str) -> tuple[str, float]:
    """An adapter and its weight: "dog/:0.5" is ("dog/", 0.5), "dog/" is ("dog/", 1.0), "C:\\dog" is itself."""
    match = re.fullmatch(r"(.+):([-+]?[0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)", text, re.IGNORECASE)
    return (match[1], float(match[2])) if match else (text, 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 where `verify` found something, 2 for input that cannot work."""
    forgive_streams()
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.simplefilter("ignore")
    from .adapters.reading import AdapterFileError

    try:
        decode_arguments(args, paths=vars(args), prefix="")
        return COMMANDS[args.command](args)
    except (AdapterFileError, ValueError, TypeError, OSError) as error:
        print(f"s2ft: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("s2ft: interrupted; nothing was left behind.", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def progress(items: Sequence[T], doing: str) -> Iterable[T]:
    """Go through items with a bar on the screen."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=doing, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)


def _info(args: argparse.Namespace) -> int:
    from .adapters.convert import describe

    found = describe(args.file, args.base)
    if args.json:
        # Where the terminal cannot show a letter, JSON has escapes of its own for it.
        print(json.dumps(found, indent=2, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8"))
        return 0
    info, layers = found["info"], found["layers"]
    words = {
        "base_model": "base model", "instance_prompt": "prompt", "subject": "subject", "class_name": "class",
        "date": "date",
    }  # fmt: skip
    for name, word in words.items():
        if name in info:
            print(f"{word:12} {info[name]}")
    if "thumbnail" in info:
        print(f"{'thumbnail':12} {info['thumbnail']} bytes")
    for name, value in info.get("training", {}).items():
        print(f"{name:12} {value}")
    for component, config in found["configs"].items():
        print(f"{component:12} {_config_line(config)}")
    print(f"{'in all':12} {found['numbers']:,} numbers in {len(layers)} layers, energy {found['energy']:.4g}\n")
    print(f"{'shape':>11} {'numbers':>8} {'rank':>5} {'energy':>10} {'share':>6}  layer")
    for layer in layers:
        shape = "x".join(map(str, layer["shape"]))
        rank = "" if layer["rank"] is None else layer["rank"]
        print(
            f"{shape:>11} {layer['numbers']:>8} {rank:>5} {layer['energy']:>10.4g} {layer['share']:>6.1%}  "
            f"{layer['component']}.{layer['name']}"
        )
    return 0


def _config_line(config: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items() if value not in (None, {}, False))


def _convert(args: argparse.Namespace) -> int:
    from .adapters.convert import convert

    written = convert(
        args.file,
        args.out,
        to=args.to,
        dtype=args.dtype,
        rank=args.rank,
        error=args.error,
        dense=args.dense,
        base=args.base,
        progress=progress,
    )
    _say(args.out, written)
    return 0


def _say(out: str, written: Any) -> None:
    low, high = written.ranks or (None, None)
    rank = "" if low is None else f", rank {low}" if low == high else f", ranks {low} to {high}"
    line = f"{printable(out)}: {written.bytes:,} bytes{rank}, relative error {written.relative_error:.2g}"
    if written.errors is not None:
        (component, name), worst = written.errors.worst
        if worst > 1e-2:
            for place in written.errors.layers:
                print(f"{written.errors.relative(place):9.2e}  {'.'.join(place)}")
        line += f" (at most {worst:.2g}, in {component}.{name})"
    print(line)


def _merge(args: argparse.Namespace) -> int:
    from .adapters.convert import merge

    merge(args.base, [weighted(text) for text in args.adapters], args.out, progress=progress)
    print(printable(f"{args.out}: {args.base} with {', '.join(args.adapters)}"))
    return 0


def _add(args: argparse.Namespace) -> int:
    from .adapters.convert import add

    adapters = [weighted(text) for text in args.adapters]
    options = {"to": args.to, "dtype": args.dtype, "rank": args.rank, "error": args.error, "base": args.base}
    _say(args.out, add(adapters, args.out, **options, progress=progress))
    return 0


def _extract(args: argparse.Namespace) -> int:
    from .adapters.convert import extract

    options = {"n_frequency": args.numbers, "oversampling": args.oversampling, "dtype": args.dtype, "base": args.base}
    _say(args.out, extract(args.file, args.out, **options, progress=progress))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .adapters.convert import verify

    problems = verify(args.file, args.base)
    for problem in problems:
        print(problem)
    print(printable(f"{args.file} {'does not fit' if problems else 'fits'} {args.base}"))
    return 1 if problems else 0


COMMANDS = {
    "info": _info, "convert": _convert, "merge": _merge, "add": _add, "extract": _extract, "verify": _verify,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
