"""Shared fixtures: small models, the embedded base, random photos."""

from __future__ import annotations

import copy
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each, in what they start as well
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from s2ft_diffusion import AdapterInfo, S2FTConfig, attention_targets, toybox
from s2ft_diffusion.adapters.file import Adapter
from s2ft_diffusion.tuner.seeding import seeded
from tests import training_process
from tests.random_adapters import tiny_denoisers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under xdist (`--dist loadgroup`) the app's tests stay together by file: a file's server is started once."""
    for item in items:
        if "gradio_app" in item.path.parts and config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


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


def tiny_modules() -> dict[str, object]:
    """The modules of a Stable Diffusion of a million random numbers, with the embedded base's words."""
    tokenizer = CLIPTokenizer.from_pretrained(toybox.base_path(), subfolder="tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "unet": UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
                cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            ).eval(),
            "vae": AutoencoderKL(
                block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            ).eval(),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
                    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ).eval(),
            "tokenizer": tokenizer,
            "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        }  # fmt: skip


def pipeline_of(modules: dict[str, object]) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def _tiny() -> dict[str, object]:
    return tiny_modules()


@pytest.fixture(scope="session")
def tiny_base(_tiny, tmp_path_factory) -> Path:
    """A folder with the tiny base: what a training in a test starts from."""
    folder = tmp_path_factory.mktemp("base")
    pipeline_of(_tiny).save_pretrained(folder)
    training_process.BASE = str(folder)
    return folder


@pytest.fixture
def pipe(_tiny) -> StableDiffusionPipeline:
    """A fresh pipeline of the tiny base: what can be adapted is a copy."""
    return pipeline_of(
        {**_tiny, **{name: copy.deepcopy(_tiny[name]) for name in ("unet", "text_encoder", "scheduler")}}
    )


@pytest.fixture(scope="session")
def _base_modules() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(toybox.base_path())


@pytest.fixture
def toybox_pipe(_base_modules) -> StableDiffusionPipeline:
    """A fresh pipeline of the embedded base, for what a trained model is needed for."""
    modules = {name: getattr(_base_modules, name) for name in ("vae", "tokenizer")}
    return pipeline_of(
        modules | {name: copy.deepcopy(getattr(_base_modules, name)) for name in ("unet", "text_encoder", "scheduler")}
    )


@pytest.fixture(scope="session")
def denoisers() -> dict[str, nn.Module]:
    """A tiny denoiser of each family, without numbers."""
    return tiny_denoisers()


def generate(pipeline: StableDiffusionPipeline, prompt: str = "a photo of sks cat", **options) -> torch.Tensor:
    """Latents of two steps, so that a difference of one bit shows."""
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


def assert_trained_alike(found: Adapter, wanted: Adapter) -> None:
    """Two trained adapters are one but for rounding.

    Orders and functions are equal, the numbers as a whole: Adam divides each gradient by its own size, so that one of
    nothing but rounding moves its number as far as any other.
    """
    assert set(found.layers) == set(wanted.layers)
    for component, layers in wanted.layers.items():
        assert set(found.layers[component]) == set(layers)
        for name, layer in layers.items():
            other = found.layers[component][name]
            states = other.state(), layer.state()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[1] if key != "coefficients"), name
            one, two = other.coefficients.flatten(), layer.coefficients.flatten()
            assert torch.cosine_similarity(one, two, dim=0) > 0.99, name
            assert two.abs().max() > 1e-3, name
