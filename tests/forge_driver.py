"""Drives Forge's own LoRA code on a CPU: python forge_driver.py CHECKOUT FAMILY FOLDER.

FOLDER holds, for a tiny model of the family, `s2ft.safetensors` and its conversions. Each is loaded by Forge's key
tables and put into the weights of Forge's own models by its patcher, as its LoRA extension does; prints JSON.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

checkout, family, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.argv = [sys.argv[0], "--always-cpu"]
sys.path[:0] = [checkout, str(Path(__file__).resolve().parents[1])]

import torch
from backend.patcher.base import ModelPatcher
from backend.patcher.lora import load_lora, model_lora_keys_clip, model_lora_keys_unet
from safetensors.torch import load_file
from torch import nn

from s2ft_diffusion.adapters.reading import read_stored
from s2ft_diffusion.adapters.tool_names import key

STRENGTH = 0.7
SIZES = {
    "sd15": {
        "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 2, 2], "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 2], "num_head_channels": 32, "use_spatial_transformer": True, "context_dim": 2048,
        "transformer_depth": [0, 0, 2, 2, 2, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2], "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 64,
    },
    "flux": {
        "in_channels": 4, "vec_in_dim": 16, "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 4,
        "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4, 8], "theta": 10000, "qkv_bias": True,
        "guidance_embed": False,
    },
}  # fmt: skip


class Denoiser(nn.Module):
    """What Forge's engines hold: the network as `diffusion_model`, and which base it is."""

    def __init__(self) -> None:
        super().__init__()
        if family == "flux":
            from backend.nn.flux import IntegratedFluxTransformer2DModel as Network
        else:
            from backend.nn.unet import IntegratedUNet2DConditionModel as Network
        self.diffusion_model = Network(**SIZES[family])
        if not hasattr(self.diffusion_model, "config"):
            self.diffusion_model.config = SIZES[family]
        self.config = SimpleNamespace(huggingface_repo=f"a/{family}")


class TextEncoder(nn.Module):
    """CLIP's layers under the names that Forge gives them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50))
        self.clip_l = nn.Module()
        self.clip_l.transformer = nn.Module()
        self.clip_l.transformer.text_model = getattr(model, "text_model", model)


def compare(adapter, component: str, model: nn.Module, names: dict, patches: dict) -> float:
    """The largest error of a weight once Forge has patched it, relative to the largest change."""
    cpu = torch.device("cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    patcher = ModelPatcher(model, load_device=cpu, offload_device=cpu)
    taken = patcher.add_patches(filename="one", patches=patches, strength_patch=STRENGTH, online_mode=False)
    assert len(taken) == len(patches) == len(adapter.layers[component]), (len(taken), len(patches))
    patcher.refresh_loras()
    wanted = {name: weight.clone() for name, weight in before.items()}
    for name, layer in adapter.layers[component].items():
        target = names[key("comfyui", component, name)]
        weight = wanted[target if isinstance(target, str) else target[0]]
        if not isinstance(target, str) and target[1] is not None:
            weight = weight.narrow(*target[1])
        weight += STRENGTH * adapter.configs[component].scaling * layer.delta().reshape(weight.shape)
    now = model.state_dict()
    largest = max(float((wanted[name] - before[name]).abs().max()) for name in wanted)
    return max(float((now[name] - wanted[name]).abs().max()) for name in wanted) / largest


def main() -> dict:
    adapter = read_stored(folder / "s2ft.safetensors")
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem == "s2ft":
            continue
        torch.manual_seed(0)
        weights, result = load_file(path), {}
        denoiser = Denoiser()
        names = model_lora_keys_unet(denoiser, {})
        patches, weights = load_lora(weights, names)
        component = "transformer" if family == "flux" else "unet"
        result[component] = compare(adapter, component, denoiser, names, patches)
        if "text_encoder" in adapter.layers:
            encoder = TextEncoder()
            names = model_lora_keys_clip(encoder, {})
            patches, weights = load_lora(weights, names)
            result["text_encoder"] = compare(adapter, "text_encoder", encoder, names, patches)
        found[path.stem] = result | {"left": sorted(weights)}
    return found


with torch.no_grad():
    print("RESULT " + json.dumps(main()))
