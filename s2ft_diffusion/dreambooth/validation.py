"""Sample images while training, and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..families import Family
from ..tuner.seeding import seeded
from .settings import ValidationSettings


class Validation:
    """Sample images with the adapter as it is, from generators of their own: training does not notice.

    With a base that is shared out, all processes make the same images `together`.
    """

    def __init__(
        self,
        settings: ValidationSettings | None,
        folder: Path,
        seed: int,
        resolution: int,
        family: Family,
        accelerator: Accelerator,
        together: bool = False,
    ) -> None:
        self.settings, self.folder, self.seed, self.resolution = settings, folder, seed, resolution
        self.family, self.accelerator, self.together = family, accelerator, together

    @torch.no_grad()
    def __call__(self, name: str, step: int) -> list[Path]:
        """Write `<name>-<i>.png`, show them to the trackers; returns the paths (none without a prompt)."""
        writes = self.accelerator.is_main_process
        if self.settings is None or not (writes or self.together):
            return []
        pipeline = self.family.pipeline
        away = self.family.away()
        for model in away:
            model.to(self.accelerator.device)
        pipeline.set_progress_bar_config(desc="validate", leave=False, disable=not writes)
        with self.accelerator.autocast(), self._decoding_exactly():
            images = pipeline(
                prompt=[self.settings.prompt] * self.settings.images,
                **self.family.call(side=self.resolution),
                generator=[seeded(self.seed, "validation", i) for i in range(self.settings.images)],
            ).images
        for model in away:
            model.to("cpu")
        if not writes:
            return []
        self._log(images, step)
        return self._write(images, name)

    @contextmanager
    def _decoding_exactly(self) -> Iterator[None]:
        """Have the autoencoder decode in its own precision, whatever the denoiser's latents are in."""
        vae = self.family.vae
        decode = vae.decode

        def decode_exactly(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.family.exactly():
                return decode(latents.to(vae.dtype), *args, **kwargs)

        vae.decode = decode_exactly
        try:
            yield
        finally:
            del vae.decode

    def _write(self, images: list[Image.Image], name: str) -> list[Path]:
        self.folder.mkdir(exist_ok=True)
        for stale in self.folder.glob(f"{name}-*.png"):
            if stale.stem.removeprefix(f"{name}-").isdecimal():
                stale.unlink()
        paths = [self.folder / f"{name}-{i}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        return paths

    def _log(self, images: list[Image.Image], step: int) -> None:
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.stack([np.asarray(i) for i in images])}, step=step, **layout)
