"""A Stable Diffusion pipeline in memory around a denoiser of some shape, and adapters for it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from s2ft_diffusion import Rearrangement, S2FTConfig, attention_targets, toybox


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


def write_s2ft(pipe: StableDiffusionPipeline, folder: Path, n: int, seed: int = 0, dtype: str = "float16") -> Path:
    """The file of a random adapter of the query and value layers."""
    torch.manual_seed(seed)
    config = S2FTConfig(target_modules=attention_targets(pipe.unet), n_frequency=n, init_weights=False, seed=seed)
    pipe.unet.add_adapter(config, "made")
    for name, module in pipe.unet.named_modules():
        if name.endswith(".s2ft_delta.made"):
            d, k = module.shape
            coefficients = module.coefficients.detach() * 1e-3
            signs = (torch.randint(0, 2, (n,), dtype=torch.int8) * 2 - 1 for n in (d, k))
            module.place({}, Rearrangement(torch.randperm(d), torch.randperm(k), *signs))
            module.coefficients.data.copy_(coefficients)
    path = pipe.save_s2ft_weights(folder, dtype=dtype)
    pipe.unload_s2ft_weights()
    return path


def write_lora(pipe: StableDiffusionPipeline, folder: Path, rank: int) -> Path:
    """The file of a random LoRA of the same layers, fp16."""
    pipe.unet.add_adapter(LoraConfig(r=rank, target_modules=attention_targets(pipe.unet), init_lora_weights=False))
    state = {key: 1e-3 * tensor.half() for key, tensor in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    pipe.unload_lora_weights()
    return folder / "pytorch_lora_weights.safetensors"
