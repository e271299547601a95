"""What other tools call a base model's layers.

A layer is known here by its component ("unet", "transformer", "text_encoder", "text_encoder_2") and its name in
diffusers' or transformers' model. Facts of other projects that this depends on are in `docs/exports.md`, with the
versions they were tried with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from .names import canonical_name

Tool = Literal["lora", "peft", "kohya", "comfyui"]

CLIP_LAYER = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
SDXL_CONTEXT = 2048  # width of the text features that cross-attention reads
# kernel sizes of a diffusers U-Net's convolutions, by the ends of their names
THREE_BY_THREE = re.compile(r"(^|\.)(conv1|conv2|conv_in|conv_out|(down|up)samplers\.\d+\.conv)$")
ONE_BY_ONE = re.compile(r"(^|\.)conv_shortcut$")
PROJECTION = re.compile(r"(^|\.)attentions\.\d+\.proj_(in|out)$")  # linear or 1x1, which the name doesn't say
# transformers that ComfyUI reads no LoRA in diffusers' names for, by layers that they alone have
_NOT_IN_COMFYUI = {
    "Lumina 2": re.compile(r"(layers|context_refiner|noise_refiner)\.\d+\.(attn\.|feed_forward\.linear_)"),
    "Sana": re.compile(r"transformer_blocks\.\d+\.ff\.conv_"),
}


def clip_name(name: str) -> str:
    """A CLIP text encoder's layer with the inner `text_model` that transformers before 5.6 has, which tools expect.

    Raises ValueError for a layer of another text encoder.
    """
    inner = name.removeprefix("text_model.")
    if not CLIP_LAYER.fullmatch(inner):
        raise ValueError(f"{name!r} is no layer of a CLIP text encoder, whose names alone other tools agree on")
    return f"text_model.{inner}"


def component_of(layer_names: Iterable[str]) -> str:
    """Which component layers belong to by their names in its model."""
    names = [canonical_name("text_encoder", name) for name in layer_names]
    if any(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in names):
        return "unet"
    encoder = all(CLIP_LAYER.fullmatch(name.removeprefix("text_model.")) for name in names)
    return "text_encoder" if encoder else "transformer"


def is_sdxl(shapes: Mapping[str, Mapping[str, tuple[int, int]]]) -> bool:
    """Whether layers (d, k) by component are those of Stable Diffusion XL: by its cross-attention, or two encoders."""
    if "text_encoder_2" in shapes and "transformer" not in shapes:
        return True
    return context_width(shapes) == SDXL_CONTEXT


def context_width(shapes: Mapping[str, Mapping[str, tuple[int, int]]]) -> int | None:
    """How wide the text features are that a U-Net's cross-attention reads; None where no layer says it."""
    found = (k for name, (_, k) in shapes.get("unet", {}).items() if name.endswith((".attn2.to_k", ".attn2.to_v")))
    return next(found, None)


def kernel_size(name: str, shape: tuple[int, int], context: int | None) -> tuple[int, ...] | None:
    """The kernel of a U-Net's layer by its name: () for a linear layer, None where the name doesn't say."""
    if THREE_BY_THREE.search(name):
        return (3, 3) if shape[1] % 9 == 0 else None
    if ONE_BY_ONE.search(name):
        return (1, 1)
    if PROJECTION.search(name):
        return {768: (1, 1), 1024: (), SDXL_CONTEXT: ()}.get(context)
    return ()


def key(tool: Tool, component: str, name: str, *, sdxl: bool = False) -> str:
    """What a tool calls a layer, without the ends that name the factors.

    "lora" is diffusers' `load_lora_weights`; "peft" names a layer in a model by itself; "kohya" are the underscored
    names of A1111, Forge and sd-scripts; "comfyui" those of ComfyUI, which are kohya's for U-Nets and else diffusers'.
    Raises ValueError for a layer that the tool has no name for.
    """
    encoder = component in ("text_encoder", "text_encoder_2")
    if tool == "peft":
        return f"base_model.model.{name}"
    if tool == "comfyui" and component == "transformer":
        for base, layers in _NOT_IN_COMFYUI.items():
            if layers.match(name):
                raise ValueError(f"ComfyUI has no names for {base}'s layers; use lora, or merge into the base")
    if tool == "comfyui" and encoder:
        return f"{component}.{clip_name(name)}"
    if tool == "lora" or (tool == "comfyui" and component == "transformer"):
        return f"{component}.{canonical_name(component, name)}"
    if component == "transformer":
        raise ValueError(
            "kohya's names are those of U-Nets and CLIP; for a transformer use comfyui (ComfyUI, Forge), or lora, from "
            "which sd-scripts' own networks/convert_flux_lora.py makes FLUX.1's"
        )
    if encoder:
        number = {"text_encoder": "1", "text_encoder_2": "2"}[component] if sdxl else ""
        return f"lora_te{number}_{clip_name(name)}".replace(".", "_")
    return f"lora_unet_{sdxl_native(name) if sdxl else name}".replace(".", "_")


def ends(tool: Tool, component: str) -> tuple[str, str]:
    """The ends of the keys of `down` and `up`."""
    if tool in ("lora", "peft") or (tool == "comfyui" and component != "unet"):
        return ".lora_A.weight", ".lora_B.weight"
    return ".lora_down.weight", ".lora_up.weight"


# Stable Diffusion XL's own names ------------------------------------------------------------------------------------

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def sdxl_native(name: str) -> str:
    """The name that Stable Diffusion XL's published checkpoints, and with them kohya's files, have for a U-Net layer.

    Raises ValueError for a layer that they do not have.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match[1], int(match[2]), match[3]
        place = f"middle_block.{2 * index if kind == 'resnets' else 1}"
        return f"{place}.{_RESNET[rest] if kind == 'resnets' else rest}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no layer of Stable Diffusion XL's U-Net")
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    down = side == "down_blocks"
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.conv"
    place = f"input_blocks.{3 * block + index + 1}" if down else f"output_blocks.{3 * block + index}"
    return f"{place}.0.{_RESNET[rest]}" if kind == "resnets" else f"{place}.1.{rest}"
