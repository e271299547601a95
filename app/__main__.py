"""python -m app"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from .arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
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
