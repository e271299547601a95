"""The pictures and captions that pretraining draws from, rendered on all cores beside it."""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from transformers import CLIPTokenizer

from ..captions import ATTRIBUTES, filler_words, random_caption
from ..tokenizer import MAX_LENGTH
from ..world import RESOLUTION, random_scene, render

CHUNK = 250  # scenes that one task renders
CAPTION_SEED = 10_000_000


class Renders:
    """Pictures and captions of `random_scene(random.Random(i))` for every i below `count`, in files of `folder`.

    Entering it starts the processes; what a former run has rendered is taken as it is.
    """

    def __init__(self, folder: Path, count: int, workers: int, captions: int = 6) -> None:
        self.folder, self.count, self.workers, self.captions_a_scene = folder, count, workers, captions
        chunks = -(-count // CHUNK)
        shapes = _shapes(count, captions, chunks)
        for name, (shape, dtype) in shapes.items():
            path = folder / f"{name}.npy"
            if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
                (folder / "done.npy").unlink(missing_ok=True)
                np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        self._tasks: list[Future[None] | None] = [None] * chunks
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Renders:
        missing = [chunk for chunk in range(len(self._tasks)) if not self._arrays["done"][chunk]]
        if missing:
            # Spawned, not forked: this process may have threads, and a GPU's context.
            self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"))
            for chunk in missing:
                self._tasks[chunk] = self._pool.submit(render_chunk, self.folder, chunk)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def wait_for(self, count: int) -> None:
        """Return when the first `count` scenes are there; raises what went wrong in rendering them."""
        for task in self._tasks[: -(-count // CHUNK)]:
            if task is not None:
                task.result()

    def pictures(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Pictures by their numbers, (n, 64, 64, 3) in uint8 on the CPU."""
        numbers = index if isinstance(index, slice) else index.numpy()
        return torch.from_numpy(np.array(self._arrays["pictures"][numbers]))

    def captions(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All captions' token ids, (scenes, captions, 32), and the numbers of the attributes that they name."""
        return tuple(torch.from_numpy(np.array(self._arrays[name])).to(device) for name in ("ids", "attributes"))


def _shapes(count: int, captions: int, chunks: int) -> dict[str, tuple[tuple[int, ...], type]]:
    return {
        "pictures": ((count, RESOLUTION, RESOLUTION, 3), np.uint8),
        "ids": ((count, captions, MAX_LENGTH), np.int16),
        "attributes": ((count, captions, len(ATTRIBUTES)), np.int8),
        "done": ((chunks,), np.bool_),
    }


def render_chunk(folder: Path, chunk: int) -> None:
    """Render one chunk into the files of `folder`, with its captions."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, filler = CLIPTokenizer.from_pretrained(folder / "tokenizer"), filler_words()
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _shapes(0, 0, 0)}
    count, captions = arrays["ids"].shape[:2]
    for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, count)):
        scene = random_scene(random.Random(i))
        arrays["pictures"][i] = np.asarray(render(scene))
        rng = random.Random(CAPTION_SEED + i)
        mentions = [random_caption(scene, rng, filler) for _ in range(captions)]
        texts = [mention.text for mention in mentions]
        arrays["ids"][i] = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np").input_ids
        for k, mention in enumerate(mentions):
            named = [(values, getattr(mention, name)) for name, values in ATTRIBUTES.items()]
            arrays["attributes"][i, k] = [len(v) if value is None else v.index(value) for v, value in named]
    for array in arrays.values():
        array.flush()
    arrays["done"][chunk] = True
    arrays["done"].flush()
