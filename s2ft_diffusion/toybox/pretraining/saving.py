"""Trained networks to pipeline folders in diffusers' layout, weights in fp16 safetensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..networks import new_flow_scheduler, new_scheduler, silent_text_encoder
from ..tokenizer import build_tokenizer


def save_unet_base(
    folder: Path, vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write the U-Net base, a Stable Diffusion."""
    pipeline = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(encoder),
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipeline, folder)


def save_flow_base(
    folder: Path,
    vae: AutoencoderKL,
    encoders: Sequence[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
) -> None:
    """Write the flow base, a Stable Diffusion 3."""
    pipeline = StableDiffusion3Pipeline(
        transformer=_half(transformer),
        scheduler=new_flow_scheduler(),
        vae=_half(vae),
        text_encoder=_half(encoders[0]),
        tokenizer=tokenizer,
        text_encoder_2=_half(encoders[1]),
        tokenizer_2=tokenizer,
        text_encoder_3=silent_text_encoder(tokenizer).half(),
        tokenizer_3=tokenizer,
    )
    _save(pipeline, folder)


def _half(model: nn.Module) -> nn.Module:
    """A copy in half precision on the CPU: both bases have the autoencoder, which stays as it is."""
    return copy.deepcopy(model).half().to("cpu", memory_format=torch.contiguous_format)


def _save(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers loads in the type that the config names; half precision is for storage alone.
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if config["model_type"] == "clip_text_model":
            _name_as_on_the_hub(path.with_name("model.safetensors"))
    for path in folder.glob("tokenizer*"):
        build_tokenizer(path)  # with the files that older readers want


def _name_as_on_the_hub(path: Path) -> None:
    """CLIP's weights as the checkpoints on the hub name them, for transformers before 5.6: newer ones read both."""
    weights = load_file(path)
    outer = ("text_model.", "text_projection.")
    save_file({n if n.startswith(outer) else f"text_model.{n}": t for n, t in weights.items()}, path, {"format": "pt"})
