"""Drives A1111's own LoRA extension on a CPU: python a1111_driver.py CHECKOUT FAMILY FOLDER.

CHECKOUT has in `repositories/` what A1111 clones at its first start (`stable-diffusion-stability-ai` and
`generative-models`), whose U-Nets it runs. FOLDER holds, for a tiny model of the family, `s2ft.safetensors` and its
conversion `kohya.safetensors`. The extension loads that and changes the weights, as it does when a layer is called;
what it imports of the user interface is stood in for. Prints JSON.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

checkout, family, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
sys.path[:0] = [str(checkout / "extensions-builtin" / "Lora"), str(Path(__file__).resolve().parents[1])]
sys.path.append(str(checkout / "repositories" / "stable-diffusion-stability-ai"))

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from s2ft_diffusion.adapters.reading import read_stored

MODEL, ENCODER = 0.7, 0.6
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True}


class Shared(ModuleType):
    """A1111's `modules.shared`, with the options at their defaults."""

    sd_model: Any = None
    cmd_opts = SimpleNamespace(lora_dir=str(folder), lyco_dir_backcompat=str(folder), no_hashing=True)
    opts = SimpleNamespace(
        lora_functional=False, lora_in_memory_limit=0, lora_preferred_name="Alias from file",
        lora_not_found_warning_console=True, lora_not_found_gradio_warning=False,
    )  # fmt: skip

    @staticmethod
    def walk_files(path: str, allowed_extensions: Any = None) -> list[str]:
        return [str(Path(path) / "kohya.safetensors")]


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def raised(error: Exception, task: str) -> None:
    raise RuntimeError(task) from error


def stand_in(name: str, kind: type = ModuleType, **contents: Any) -> ModuleType:
    """Puts a module of A1111 that needs its user interface or settings aside for one with what the extension asks."""
    module = kind(name)
    vars(module).update(contents)
    sys.modules[name] = module
    if "." in name:
        parent, _, own = name.rpartition(".")
        setattr(sys.modules[parent], own, module)
    return module


def package(name: str, path: Path) -> None:
    """A package of a checkout without what its `__init__` imports."""
    stand_in(name, __path__=[str(path)])


package("modules", checkout / "modules")
shared = stand_in("modules.shared", Shared)
stand_in("gradio")
stand_in("modules.devices", cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32,
         torch_gc=lambda: None)  # fmt: skip
stand_in("modules.sd_models", read_state_dict=load_file, read_metadata_from_safetensors=metadata)
stand_in("modules.errors", display=raised)
stand_in("modules.scripts")
stand_in("modules.cache", cached_data_for_file=lambda title, name, path, read: read())
stand_in("modules.hashes", sha256_from_cache=lambda *a, **k: None, sha256=lambda *a, **k: None)
hijack = SimpleNamespace(embedding_db=SimpleNamespace(skipped_embeddings={}, word_embeddings={}), comments=[])
stand_in("modules.sd_hijack", model_hijack=hijack)
package("modules.textual_inversion", checkout / "modules" / "textual_inversion")
stand_in("modules.textual_inversion.textual_inversion")
stand_in("modules.models", __path__=[str(checkout / "modules" / "models")])
stand_in("modules.models.sd3", __path__=[str(checkout / "modules" / "models" / "sd3")])
stand_in("modules.models.sd3.other_impls", attention=None, Mlp=nn.Module)

import networks


class CLIP(nn.Module):
    """CLIP's layers under the names that they have in A1111's first text encoder."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50))
        self.transformer = nn.Module()
        self.transformer.text_model = getattr(model, "text_model", model)


class OpenCLIP(nn.Module):
    """The layers of XL's second text encoder, which has query, key and value in one weight."""

    def __init__(self) -> None:
        super().__init__()
        blocks = []
        for _ in range(2):
            block = nn.Module()
            block.attn = nn.MultiheadAttention(64, 2)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(64, 128), nn.Linear(128, 64)
            blocks.append(block)
        self.model = nn.Module()
        self.model.transformer = nn.Module()
        self.model.transformer.resblocks = nn.ModuleList(blocks)


def tiny_model() -> SimpleNamespace:
    """What A1111 holds of a checkpoint, as far as the extension looks at it."""
    torch.manual_seed(0)
    if family == "sd15":
        from ldm.modules.diffusionmodules.openaimodel import UNetModel

        unet = UNetModel(
            **UNET, num_res_blocks=2, channel_mult=[1, 2, 2, 2], num_heads=8, context_dim=768, transformer_depth=1,
            attention_resolutions=[4, 2, 1], use_checkpoint=False, legacy=False,
        )  # fmt: skip
        encoders = {"cond_stage_model": SimpleNamespace(wrapped=CLIP())}
    else:
        sgm = checkout / "repositories" / "generative-models" / "sgm"
        for name in ("sgm", "sgm.modules", "sgm.modules.diffusionmodules"):
            package(name, sgm.joinpath(*name.split(".")[1:]))
        from sgm.modules.diffusionmodules.openaimodel import UNetModel

        sizes = {name: value for name, value in UNET.items() if name != "image_size"}
        unet = UNetModel(
            **sizes, num_res_blocks=2, channel_mult=[1, 2, 2], num_head_channels=32, context_dim=2048,
            transformer_depth=[0, 2, 2], use_linear_in_transformer=True, attention_resolutions=[4, 2],
            num_classes="sequential", adm_in_channels=64, use_checkpoint=False, spatial_transformer_attn_type="softmax",
        )  # fmt: skip
        embedders = [SimpleNamespace(wrapped=CLIP()), SimpleNamespace(wrapped=OpenCLIP()), SimpleNamespace()]
        encoders = {"conditioner": SimpleNamespace(embedders=embedders)}
    model = nn.Module()
    model.diffusion_model = unet
    for weight in unet.parameters():
        weight.copy_(torch.randn(weight.shape) * 0.1)
    return SimpleNamespace(is_sdxl=family == "sdxl", model=model, **encoders)


def weight_of(component: str, name: str, mapping: dict[str, nn.Module]) -> torch.Tensor:
    """The weight of A1111's model, or the rows of one, that a layer of diffusers' is: by its own table of names."""
    from s2ft_diffusion.adapters.tool_names import clip_name, sdxl_native

    if component == "unet":
        if family == "sdxl":
            return mapping[f"diffusion_model.{sdxl_native(name)}".replace(".", "_")].weight
        key = networks.convert_diffusers_name_to_compvis(f"lora_unet_{name}".replace(".", "_"), False)
        return mapping[key].weight
    inner = clip_name(name).replace(".", "_")
    if component == "text_encoder":
        return mapping[f"{'0_' if family == 'sdxl' else ''}transformer_{inner}"].weight
    block = f"1_model_transformer_resblocks_{name.split('layers.')[1].split('.')[0]}"
    last = name.rsplit(".", 1)[1]
    if last in ("fc1", "fc2"):
        return mapping[f"{block}_mlp_{'c_fc' if last == 'fc1' else 'c_proj'}"].weight
    attention = mapping[f"{block}_attn"]
    if last == "out_proj":
        return attention.out_proj.weight
    return attention.in_proj_weight.chunk(3)["qkv".index(last[0])]


def main() -> dict[str, Any]:
    adapter = read_stored(folder / "s2ft.safetensors")
    shared.sd_model = model = tiny_model()
    networks.assign_network_names_to_compvis_modules(model)
    mapping = model.network_layer_mapping
    networks.extra_network_lora = SimpleNamespace(errors={})
    disk = networks.available_networks["kohya"]
    networks.load_networks(["kohya"], [ENCODER], [MODEL], [None])
    (net,) = networks.loaded_networks
    keys = {key.split(".")[0] for key in load_file(folder / "kohya.safetensors")}
    taken = {module.network_key.split(".")[0] for module in net.modules.values()}

    wanted, largest = {}, 0.0
    for component, layers in adapter.layers.items():
        strength = MODEL if component == "unet" else ENCODER
        for name, layer in layers.items():
            weight = weight_of(component, name, mapping)
            change = strength * adapter.configs[component].scaling * layer.delta().reshape(weight.shape)
            wanted[component, name] = weight.clone() + change
            largest = max(largest, float(change.abs().max()))
    untouched = {
        name: module.weight.clone()
        for name, module in mapping.items()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in net.modules and "_attn_out_proj" not in name
    }
    for module in mapping.values():  # what the extension's `forward` of these classes begins with
        inner = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # which attention doesn't call
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and not inner:
            networks.network_apply_weights(module)
    errors = [float((weight_of(*place, mapping) - weight).abs().max()) for place, weight in wanted.items()]
    return {
        "missed": sorted(keys - taken), "layers": len(wanted), "made": len(net.modules),
        "error": max(errors) / largest, "complaints": networks.extra_network_lora.errors,
        "unchanged": all(torch.equal(mapping[name].weight, weight) for name, weight in untouched.items()),
        "version": disk.sd_version.name, "title": disk.alias,
    }  # fmt: skip


with torch.no_grad():
    print("RESULT " + json.dumps(main()))
