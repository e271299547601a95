"""python -m app"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from s2ft_diffusion.text import forgive_streams

from .arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> None:
    forgive_streams()
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for chatty in ("httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from .server import launch  # after --help: this imports torch

    for number in (signal.SIGINT, signal.SIGTERM):  # a service manager's way of saying Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        launch(args)
    except OSError as error:
        print(f"python -m app: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
