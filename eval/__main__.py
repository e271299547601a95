"""`python -m eval score`, `compare`, `spectrum` and `ablation`, alone or under `accelerate launch -m eval ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from s2ft_diffusion.text import HelpFormatter, decode_arguments, forgive_streams

from . import ablation, compare, score, spectrum
from .encoders import EncoderError

TEXTS = {"class_name", "token"}  # all else is, or may be, a path
COMMANDS = {"score": score, "compare": compare, "spectrum": spectrum, "ablation": ablation}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for input that cannot work."""
    forgive_streams()
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        words = {"help": module.__doc__, "description": module.__doc__, "formatter_class": HelpFormatter}
        module.add_arguments(commands.add_parser(name, **words))
    args = parser.parse_args(arguments)
    try:
        decode_arguments(args, paths=vars(args).keys() - TEXTS)
        COMMANDS[args.command].run(args)
    except (*score.ERRORS, EncoderError) as error:
        print(f"eval {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
