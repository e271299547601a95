"""A Stable Diffusion pipeline in memory around a denoiser of some shape, and adapters for it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from s2ft_diffusion import Rearrangement, S2FTConfig, attention_targets, toybox
from s2ft_diffusion.pipelines.targets import Targets


def around(unet: nn.Module) -> StableDiffusionPipeline:
    """A pipeline around a UNet; text encoder and autoencoder are small, so that the UNet is what is measured."""
    width = unet.config.cross_attention_dim
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4)
        ),
        tokenizer=CLIPTokenizer.from_pretrained(toybox.base_path() / "tokenizer"),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_s2ft(
    pipe: StableDiffusionPipeline,
    folder: Path,
    n: int,
    seed: int = 0,
    dtype: str = "float16",
    targets: Targets = "qv",
) -> Path:
    """The file of a random adapter."""
    torch.manual_seed(seed)
    names = attention_targets(pipe.unet, targets)
    pipe.unet.add_adapter(S2FTConfig(target_modules=names, n_frequency=n, init_weights=False, seed=seed), "made")
    for name in names:
        layer = pipe.unet.get_submodule(name)
        delta, linear = layer.s2ft_delta["made"], isinstance(layer.get_base_layer(), nn.Linear)
        coefficients = delta.coefficients.detach() * 1e-3
        rows, columns = ((torch.randperm(n), _signs(n)) for n in delta.shape)
        if not linear:  # a convolution's columns stay as they are
            columns = torch.arange(delta.shape[1]), torch.ones(delta.shape[1], dtype=torch.int8)
        delta.place({}, Rearrangement(rows[0], columns[0], rows[1], columns[1]))
        delta.coefficients.data.copy_(coefficients)
    path = pipe.save_s2ft_weights(folder, dtype=dtype)
    pipe.unload_s2ft_weights()
    return path


def _signs(n: int) -> torch.Tensor:
    return torch.randint(0, 2, (n,), dtype=torch.int8) * 2 - 1


def write_lora(pipe: StableDiffusionPipeline, folder: Path, rank: int, targets: Targets = "qv") -> Path:
    """The file of a random LoRA of the same layers, fp16."""
    names = attention_targets(pipe.unet, targets)
    pipe.unet.add_adapter(LoraConfig(r=rank, target_modules=names, init_lora_weights=False))
    state = {key: 1e-3 * tensor.half() for key, tensor in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    pipe.unload_lora_weights()
    return folder / "pytorch_lora_weights.safetensors"
