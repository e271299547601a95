"""Sample images while training, and at its end."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..tuner.seeding import seeded
from .base import Base, BasePlan


class Validation:
    """Sample images with the adapter as it is, from generators of their own: training does not notice."""

    def __init__(self, args: argparse.Namespace, plan: BasePlan, base: Base, accelerator: Accelerator) -> None:
        self.args, self.plan, self.base, self.accelerator = args, plan, base, accelerator
        self.folder = Path(args.output_dir) / "validation"

    @torch.no_grad()
    def __call__(self, name: str, step: int) -> list[Path]:
        """Write `validation/<name>-<i>.png`, show them to the trackers; returns the paths (none without a prompt)."""
        args = self.args
        if not args.validation_prompt or not self.accelerator.is_main_process:
            return []
        self.base.vae.to(self.accelerator.device)
        pipeline = self.base.pipeline(self.plan)
        pipeline.set_progress_bar_config(desc="validate", leave=False)
        with self.accelerator.autocast():
            images = pipeline(
                [args.validation_prompt] * args.num_validation_images,
                height=self.plan.resolution,
                width=self.plan.resolution,
                generator=[seeded(args.seed, "validation", i) for i in range(args.num_validation_images)],
            ).images
        self._log(images, step)
        return self._write(images, name)

    def _write(self, images: list[Image.Image], name: str) -> list[Path]:
        self.folder.mkdir(exist_ok=True)
        for stale in self.folder.glob(f"{name}-*.png"):
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
