"""Errors as messages on the page."""

from __future__ import annotations

import html
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr

from .limits import RequestError

logger = logging.getLogger("app")


def plain_text(words: str) -> str:
    """Words for a message, which Gradio would take for HTML: names in them come from strangers' files."""
    return html.escape(words, quote=False)


def message(words: str) -> gr.Error:
    """An error that the page shows."""
    return gr.Error(plain_text(words), print_exception=False)


def polite(action: Callable[..., Any], failed: Callable[[str], tuple[Any, ...]] | None = None) -> Callable[..., Any]:
    """Turn errors into messages: those meant for the person as they are, all others without their details.

    Args:
        action: a function or generator that an event calls.
        failed: for a generator, what it shows last, made of the message.
    """

    def words(error: Exception) -> str:
        if isinstance(error, RequestError):
            return str(error)
        logger.exception("%s failed", action.__name__)
        return "Something went wrong here; the server's log says what."

    @wraps(action)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise message(words(error)) from None

    @wraps(action)
    def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            said = words(error)
            if failed is not None:
                yield failed(said)
            raise message(said) from None

    return iterate if inspect.isgeneratorfunction(action) else run
