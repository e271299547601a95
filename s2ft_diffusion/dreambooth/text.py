"""Text from the command line and from file names, which are bytes: decoded, or shown so that it can be written."""

from __future__ import annotations

import os


def printable(text: object) -> str:
    r"""A name or message for logs, trackers and files: bytes that are no UTF-8 as escapes, "caf\\xe9.png"."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decoded(argument: str) -> str:
    """An argument as its UTF-8 bytes say, whatever the locale; raises ValueError where they are none.

    Python decodes arguments by the locale and keeps bytes that it cannot decode as lone surrogates.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode()
    return argument
