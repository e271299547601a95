"""Drives sd-scripts' own LoRA code on a CPU: python sd_scripts_driver.py CHECKOUT FAMILY FOLDER.

FOLDER holds, for a tiny Stable Diffusion 1.5, a tiny FLUX.1, or a full-size Stable Diffusion XL without weights,
`s2ft.safetensors` and its conversion: kohya's, or for FLUX.1 diffusers', which sd-scripts' own converter renames.
sd-scripts' network is made from that and merged, but for XL; prints JSON.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path

checkout, family, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.path[:0] = [checkout, str(Path(__file__).resolve().parents[1])]

import torch
from library import original_unet, sdxl_original_unet
from networks import lora
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from s2ft_diffusion.adapters.reading import read_stored

STRENGTH = 0.7


class TextEncoder(nn.Module):
    """CLIP within `text_model`, as in the transformers that sd-scripts is pinned to."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50))
        self.text_model = getattr(model, "text_model", model)


def models() -> tuple[nn.Module, nn.Module]:
    """sd-scripts' U-Net and a text encoder: a tiny Stable Diffusion 1.5, or XL's U-Net without weights."""
    torch.manual_seed(0)
    if family == "sdxl":
        with torch.device("meta"):
            return sdxl_original_unet.SdxlUNet2DConditionModel(), TextEncoder()
    original_unet.BLOCK_OUT_CHANNELS = (32, 64, 64, 64)
    original_unet.TIMESTEP_INPUT_DIM, original_unet.TIME_EMBED_DIM = 32, 128
    return original_unet.UNet2DConditionModel(8, 8, 768), TextEncoder()


FLUX = {  # what the layers of a block are called, and where those that sd-scripts has in one are put: rows
    "attn.to_q": ("img_attn.qkv", 0), "attn.to_k": ("img_attn.qkv", 64), "attn.to_v": ("img_attn.qkv", 128),
    "attn.add_q_proj": ("txt_attn.qkv", 0), "attn.add_k_proj": ("txt_attn.qkv", 64),
    "attn.add_v_proj": ("txt_attn.qkv", 128), "attn.to_out.0": ("img_attn.proj", 0),
    "attn.to_add_out": ("txt_attn.proj", 0), "ff.net.0.proj": ("img_mlp.0", 0), "ff.net.2": ("img_mlp.2", 0),
    "ff_context.net.0.proj": ("txt_mlp.0", 0), "ff_context.net.2": ("txt_mlp.2", 0),
}  # fmt: skip
FLUX_SINGLE = {
    "attn.to_q": ("linear1", 0), "attn.to_k": ("linear1", 64), "attn.to_v": ("linear1", 128),
    "proj_mlp": ("linear1", 192), "proj_out": ("linear2", 0),
}  # fmt: skip


def flux() -> dict:
    """FLUX.1: sd-scripts' converter, network and merging on a model of one block of each kind and width 64."""
    from library import flux_models
    from networks import convert_flux_lora, lora_flux

    adapter = read_stored(folder / "s2ft.safetensors")
    weights = load_file(folder / "lora.safetensors")
    converted = convert_flux_lora.convert_ai_toolkit_to_sd_scripts(weights)
    torch.manual_seed(0)
    model = flux_models.Flux(flux_models.FluxParams(16, 16, 32, 64, 4.0, 4, 1, 1, [4, 4, 8], 10000, True, False))
    network, converted = lora_flux.create_network_from_weights(
        STRENGTH, None, None, [], model, converted, for_inference=True
    )
    made = {module.lora_name for module in network.unet_loras}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    network.merge_to([], model, converted, torch.float32, torch.device("cpu"))
    wanted = {name: weight.clone() for name, weight in before.items()}
    for name, layer in adapter.layers["transformer"].items():
        kind, number, rest = name.split(".", 2)
        single = kind == "single_transformer_blocks"
        place, row = (FLUX_SINGLE if single else FLUX)[rest]
        weight = wanted[f"{'single' if single else 'double'}_blocks.{number}.{place}.weight"]
        delta = layer.delta()
        weight[row : row + len(delta)] += STRENGTH * adapter.configs["transformer"].scaling * delta
    largest = max(float((wanted[name] - before[name]).abs().max()) for name in wanted)
    error = max(float((weight - wanted[name]).abs().max()) for name, weight in model.state_dict().items())
    missed = [*weights, *sorted({key.split(".")[0] for key in converted} - made)]
    return {"missed": missed, "made": len(made), "transformer": error / largest}


def main() -> dict:
    if family == "flux":
        return flux()
    adapter = read_stored(folder / "s2ft.safetensors")
    weights = load_file(folder / "kohya.safetensors")
    unet, text_encoder = models()
    encoder = [text_encoder, TextEncoder()] if family == "sdxl" else text_encoder
    network, weights = lora.create_network_from_weights(
        STRENGTH, None, None, encoder, unet, weights, for_inference=True
    )
    made = {module.lora_name for module in network.text_encoder_loras + network.unet_loras}
    found = {"missed": sorted({key.split(".")[0] for key in weights} - made), "made": len(made)}
    if family == "sdxl":
        return found
    parts = {"unet": unet, "text_encoder": text_encoder}
    before = {name: {n: w.clone() for n, w in part.state_dict().items()} for name, part in parts.items()}
    network.merge_to(text_encoder, unet, weights, torch.float32, torch.device("cpu"))
    for component, part in parts.items():
        now, errors, changes = part.state_dict(), [0.0], [0.0]
        for name, weight in before[component].items():
            layer = adapter.layers[component].get(name.removesuffix(".weight"))
            change = torch.zeros_like(weight)
            if layer is not None and name.endswith(".weight"):
                change = STRENGTH * adapter.configs[component].scaling * layer.delta().reshape(weight.shape)
            errors.append(float((now[name] - weight - change).abs().max()))
            changes.append(float(change.abs().max()))
        found[component] = max(errors) / max(changes)
    return found


with torch.no_grad():
    print("RESULT " + json.dumps(main()))
