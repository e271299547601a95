"""python -m app"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from .arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from .server import launch  # after --help: this imports torch

    try:
        launch(args)
    except OSError as error:
        print(f"python -m app: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
