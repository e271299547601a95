"""How long pretraining takes: steps and batches of every stage."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """Steps and batches of the stages, and what they draw from.

    Attributes:
        scenes: pictures that are rendered, each with `captions` captions.
        workers: processes that render.
        compile: whether steps are compiled. On a CPU this concerns the autoencoder alone, whose step gains most.
        every: steps between checkpoints.
    """

    scenes: int
    autoencoder: int
    autoencoder_batch: int
    text: int
    text_batch: int
    unet: int
    transformer: int
    batch: int
    captions: int = 6
    workers: int = 1
    compile: bool = True
    every: int = 500

    @classmethod
    def for_device(cls, device: torch.device) -> Plan:
        """Minutes on a GPU of a data centre; about five hours on two CPU cores."""
        cores = os.cpu_count() or 1
        if device.type == "cuda":
            return cls(100_000, 2200, 192, 600, 384, unet=2400, transformer=6000, batch=768, workers=max(1, cores - 1))
        return cls(40_000, 6000, 16, 800, 128, unet=6000, transformer=9000, batch=64, workers=cores)

    def batch_of(self, stage: str) -> int:
        """Samples a step of the stage called `stage`."""
        if stage == "autoencoder":
            return self.autoencoder_batch
        return self.batch if stage in ("unet", "transformer") else self.text_batch
