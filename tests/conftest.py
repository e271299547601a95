"""Shared fixtures: small models, the embedded base, random photos."""

from __future__ import annotations

import copy
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

from s2ft_diffusion import AdapterInfo, S2FTConfig, attention_targets, toybox
from s2ft_diffusion.tuner.seeding import seeded

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


def add(pipe, name="one", *, text=False, **options) -> None:
    """Put a random adapter on the denoiser (and the text encoder)."""
    for model in [pipe.unet, *([pipe.text_encoder] if text else [])]:
        config = S2FTConfig(
            target_modules=attention_targets(model), n_frequency=300, scaling=2.0, init_weights=False, **options
        )
        model.add_adapter(config, name)


@pytest.fixture
def folder(pipe, tmp_path):
    """A folder with an adapter file of random coefficients, and what the adapted pipeline makes."""
    torch.manual_seed(1)
    add(pipe)
    expected = generate(pipe)
    pipe.save_s2ft_weights(tmp_path / "one", info=AdapterInfo(base_model="toybox", subject="cat"))
    pipe.unload_s2ft_weights()
    return tmp_path / "one", expected


def second_folder(pipe, tmp_path):
    torch.manual_seed(2)
    add(pipe, "two", seed=1)
    pipe.save_s2ft_weights(tmp_path / "two")
    pipe.unload_s2ft_weights()
    return tmp_path / "two"


def state(pipe) -> dict[str, torch.Tensor]:
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}


def same_state(pipe, before) -> bool:
    after = state(pipe)
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def copy_of(pipe) -> StableDiffusionPipeline:
    """A pipeline of the same models, its denoiser a copy without adapters."""
    clean = copy.deepcopy(pipe.unet)
    other = StableDiffusionPipeline(**{**pipe.components, "unet": clean}, requires_safety_checker=False)
    other.unload_s2ft_weights()
    return other
