"""Shared fixtures: small models, the embedded base, random photos."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

import s2ft_diffusion  # noqa: F401  (installs the pipeline verbs)
from s2ft_diffusion import toybox
from s2ft_diffusion.seeding import seeded

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


class TwoLayers(nn.Module):
    """Two linear layers of different, odd-sized shapes, with a nonlinearity between."""

    def __init__(self, width: int = 12, hidden: int = 16, out: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def two_layers() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers()


@pytest.fixture(scope="session")
def _base_modules() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(toybox.base_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe(_base_modules: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A fresh pipeline of the embedded base: its adapted models are copies."""
    import copy

    return StableDiffusionPipeline(
        vae=_base_modules.vae,
        text_encoder=copy.deepcopy(_base_modules.text_encoder),
        tokenizer=_base_modules.tokenizer,
        unet=copy.deepcopy(_base_modules.unet),
        scheduler=copy.deepcopy(_base_modules.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def generate(pipeline: StableDiffusionPipeline, prompt: str = "a photo of sks cat", **options) -> torch.Tensor:
    """Latents of two steps, so that a difference of one bit shows."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded("test"), **options}
    return pipeline(prompt, **options).images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three small square pictures."""
    folder = tmp_path / "my dog"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((80, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder
