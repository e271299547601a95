"""Denoisers by their published shapes, with random weights: nothing is downloaded.

`sd15`, `sdxl` and `klein` (FLUX.2-klein-4B) are the real sizes; `klein-blocks` has one of klein's five double blocks
and four of its twenty single ones, and is built in a fifth of the time; `-small` ones have the same structure and run
anywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, UNet2DConditionModel
from torch import nn

from s2ft_diffusion import attention_targets

# The projections of PEFT's own comparison of methods on FLUX.2-klein.
KLEIN_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    "linear_in", "linear_out",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A denoiser: how to build it, its inputs for a batch of images of some pixels a side, what to adapt."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    targets: Callable[[nn.Module], list[str]]
    pixels: int


def _unet_inputs(width: int) -> Callable[[int, int], dict[str, Any]]:
    def make(batch: int, pixels: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, 4, pixels // 8, pixels // 8),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 77, width),
        }

    return make


def _sdxl_inputs(width: int, pooled: int) -> Callable[[int, int], dict[str, Any]]:
    def make(batch: int, pixels: int) -> dict[str, Any]:
        conditions = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, 6), float(pixels))}
        return {**_unet_inputs(width)(batch, pixels), "added_cond_kwargs": conditions}

    return make


def _klein_inputs(width: int, channels: int) -> Callable[[int, int], dict[str, Any]]:
    def make(batch: int, pixels: int) -> dict[str, Any]:
        side = pixels // 16
        place = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1))
        words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(512))
        return {
            "hidden_states": torch.randn(batch, side * side, channels),
            "encoder_hidden_states": torch.randn(batch, 512, width),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": place.expand(batch, -1, -1).float(),
            "txt_ids": words.expand(batch, -1, -1).float(),
        }

    return make


def _sdxl(channels: tuple[int, ...], heads: tuple[int, ...], width: int, time: int, pooled: int) -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=heads,
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=6 * time + pooled,
    )


def _klein(heads: int, double: int, single: int, width: int) -> nn.Module:
    return Flux2Transformer2DModel(
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=width,
        guidance_embeds=False,
    )


def _klein_targets(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [n for n in names if any(n == target or n.endswith(f".{target}") for target in KLEIN_TARGETS)]


SHAPES = {
    "sd15": Shape(lambda: UNet2DConditionModel(cross_attention_dim=768), _unet_inputs(768), attention_targets, 256),
    "sd15-small": Shape(
        lambda: UNet2DConditionModel(
            block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, norm_num_groups=8, attention_head_dim=4
        ),
        _unet_inputs(64), attention_targets, 64,
    ),
    "sdxl": Shape(
        lambda: _sdxl((320, 640, 1280), (5, 10, 20), 2048, 256, 1280),
        _sdxl_inputs(2048, 1280), attention_targets, 1024,
    ),
    "sdxl-small": Shape(
        lambda: _sdxl((32, 64, 128), (2, 4, 8), 64, 32, 64), _sdxl_inputs(64, 64), attention_targets, 64
    ),
    "klein": Shape(lambda: _klein(24, 5, 20, 7680), _klein_inputs(7680, 128), _klein_targets, 512),
    "klein-blocks": Shape(lambda: _klein(24, 1, 4, 7680), _klein_inputs(7680, 128), _klein_targets, 512),
    "klein-small": Shape(lambda: _klein(2, 1, 2, 64), _klein_inputs(64, 128), _klein_targets, 64),
}  # fmt: skip


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser of a shape, frozen, its weights random (drawn in place: a default initialisation takes minutes)."""
    return random_weights(SHAPES[name].build, device, dtype)


def random_weights(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """What `make` builds, frozen, its weights random."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device=device).to(dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for path, module in model.named_modules():
        for part, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(1.0 if part == "weight" else 0.0)
        assert not any(b.is_meta for b in module.buffers(recurse=False)), path
    return model


def inputs(name: str, batch: int, pixels: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of a shape's denoiser."""

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(part) for key, part in value.items()}
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    torch.manual_seed(0)
    return place(SHAPES[name].inputs(batch, pixels))


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the very same weights."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)
