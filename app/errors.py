"""Errors as messages on the page."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr

from .limits import RequestError

logger = logging.getLogger("app")


def polite(action: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into messages: those meant for the person as they are, all others without their details."""

    def translate(error: Exception) -> gr.Error:
        if isinstance(error, RequestError):
            return gr.Error(str(error), print_exception=False)
        logger.exception("%s failed", action.__name__)
        return gr.Error("Something went wrong here; the server's log says what.", print_exception=False)

    @wraps(action)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise translate(error) from None

    @wraps(action)
    def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from action(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise translate(error) from None

    return iterate if inspect.isgeneratorfunction(action) else run
