"""Putting the app together and serving it."""

from __future__ import annotations

import argparse
import gc
import logging
import os
from contextlib import ExitStack
from pathlib import Path

import gradio as gr
from filelock import FileLock, Timeout

from s2ft_diffusion import toybox

from .app import App
from .arguments import ROOT
from .engine import Engine
from .frontend import CSS, HEAD_JS, PAGE_CSS
from .history import History, base_folder
from .library import Library
from .page import Page, theme
from .training import TrainingQueue

logger = logging.getLogger("app")
DEMO_ADAPTERS = Path(__file__).parent / "adapters"
QUEUE_LOOKS_EVERY = 0.05  # seconds
MADE_BY_DEMO = ROOT / "outputs" / "demo" / "adapter"


def build(args: argparse.Namespace) -> tuple[gr.Blocks, App]:
    """Load the base, look for adapters, build the page; raises OSError for a base that cannot be loaded."""
    outputs = args.outputs.resolve()
    outputs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(outputs / "app.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another app is using {outputs}; choose another --outputs.") from None
    engine = Engine(
        args.base,
        device=args.device,
        dtype=args.dtype,
        pipelines=args.concurrency,
        quantize=args.quantize,
        offload=args.offload,
    )
    sources = list(args.adapters)
    if not sources and toybox.is_embedded(args.base):
        sources = [str(folder) for folder in (MADE_BY_DEMO, DEMO_ADAPTERS) if folder.is_dir()]
    library = Library(sources, outputs / "adapters", engine.components, args.base)
    trainings = None
    if not args.no_training:
        flags = [*(["--quantize", args.quantize] if args.quantize else []), *(["--offload"] if args.offload else [])]
        trainings = TrainingQueue(
            outputs / "trainings", args.base, lambda path: library.add(path).id, device=args.device, flags=flags
        )
    app = App(engine, library, History(base_folder(outputs / "history", args.base)), trainings, lock)
    blocks = Page(app, concurrency=args.concurrency).build()
    blocks.queue(max_size=args.max_queue, default_concurrency_limit=8)
    # Gradio looks for waiting events a thousand times a second (on Windows: twenty times). On a CPU each look takes a
    # core away from the generation under way, which then waits for it.
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        if hasattr(blocks._queue, name):
            setattr(blocks._queue, name, QUEUE_LOOKS_EVERY)
    return blocks, app


def launch(args: argparse.Namespace, *, block: bool = True) -> tuple[gr.Blocks, App, str]:
    """Serve; returns the page, the app and the local address (at once if not `block`)."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    blocks, app = build(args)
    with ExitStack() as stack:
        stack.callback(close, blocks, app)  # whenever it is told to stop, while starting too
        _, address, _ = blocks.launch(
            server_name=args.host,
            server_port=args.port or None,
            root_path=args.root_path,
            share=args.share,
            auth=args.auth,
            max_file_size=f"{args.max_upload_mb}mb",
            theme=theme(),
            css=CSS,
            head=f"<style>{PAGE_CSS}</style><script>{HEAD_JS}</script>",
            show_error=False,
            prevent_thread_lock=True,
            quiet=True,
        )
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again and again would slow down every generation
        usable = len(app.library.choices())
        logger.info("%s with %d adapters, at %s", args.base, usable, address)
        if block:
            blocks.block_thread()
        else:
            stack.pop_all()
    return blocks, app, address


def close(blocks: gr.Blocks, app: App) -> None:
    """Stop serving, and whatever is under way."""
    app.close()
    blocks.close(verbose=False)
