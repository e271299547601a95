"""Text from the command line and from file names, which are bytes: decoded, or shown so that it can be written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection

from .errors import InputError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def forgive_streams() -> None:
    """Let standard output and error take any text: a name that the terminal cannot show is no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


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


def as_argument(text: str) -> str:
    """The inverse of `decoded`: text as a path, or an argument to another program, in whatever locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def decode_arguments(
    args: argparse.Namespace, *, paths: Collection[str], secrets: Collection[str] = (), prefix: str = "--"
) -> None:
    """Make text of what is text, in whatever locale; a path stays as the system has it, but must be printable.

    Raises InputError for what is no UTF-8, without showing `secrets`.
    """
    for name, value in vars(args).items():
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str | os.PathLike):
                continue
            try:
                text = decoded(os.fspath(each))
            except UnicodeDecodeError:
                shown = "" if name in secrets else f": {printable(each)}"
                raise InputError(f"{prefix}{name}{shown} is not UTF-8; write it so, or rename it.") from None
            if isinstance(value, str) and name not in paths:
                setattr(args, name, text)
