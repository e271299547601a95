"""Runs in ComfyUI's Python, on its own code: python comfyui_driver.py CHECKOUT FAMILY FOLDER.

FOLDER holds, for a tiny model of the family, `s2ft.safetensors` and its conversions; ComfyUI's own loaders apply each,
and the weights that its patcher makes are compared with the sums. Prints JSON.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

checkout, family, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.argv = [sys.argv[0], "--cpu"]
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [checkout, str(root), str(root / "integrations")]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams

from s2ft_diffusion.adapters.reading import read_stored
from s2ft_diffusion.adapters.tool_names import key

UNET = {"image_size": 32, "out_channels": 4, "in_channels": 4, "legacy": False, "use_spatial_transformer": True}
FLUX = {
    "image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 16, "context_in_dim": 32,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4, 8],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
FAMILIES = {
    "sd15": ("SD15", {
        **UNET, "model_channels": 32, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 2, 2], "num_heads": 8,
        "context_dim": 768, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
    }),
    "sdxl": ("SDXL", {
        **UNET, "model_channels": 32, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 2], "num_head_channels": 32,
        "context_dim": 2048, "transformer_depth": [0, 0, 2, 2, 2, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2], "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 64,
    }),
    "sd3": ("SD3", {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None, "adm_in_channels": 16,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
        "pos_embed_max_size": 8, "num_patches": 64, "pos_embed_scaling_factor": None,
    }),
    "flux": ("Flux", FLUX),
    "flux2": ("Flux2", {
        **FLUX, "image_model": "flux2", "in_channels": 16, "out_channels": 16, "mlp_ratio": 3.0, "patch_size": 1,
        "vec_in_dim": None, "qkv_bias": False, "axes_dim": [4, 4, 4, 4], "global_modulation": True,
        "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
    }),
    "qwen": ("QwenImage", {
        "image_model": "qwen_image", "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
    }),
    "zimage": ("ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 4, "dim": 64, "n_layers": 1, "n_refiner_layers": 1,
        "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 32, "axes_dims": [4, 4, 8], "axes_lens": [32, 32, 32],
        "qk_norm": True, "z_image_modulation": True, "ffn_dim_multiplier": 8 / 3, "rope_theta": 256.0,
        "time_scale": 1000.0, "pad_tokens_multiple": 32, "multiple_of": 2,
    }),
}  # fmt: skip


class Warnings(logging.Handler):
    """Collects what ComfyUI complains of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def tiny_model() -> comfy.model_patcher.ModelPatcher:
    kind, config = FAMILIES[family]
    if family == "flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # since ComfyUI has FLUX.2
        config = {**config, "txt_ids_dims": []}
    torch.manual_seed(0)
    made = getattr(comfy.supported_models, kind)(config)
    made.unet_config = {**config, "dtype": torch.float32}
    model = made.get_model({}, device="cpu")
    with torch.no_grad():
        for weight in model.diffusion_model.state_dict().values():  # buffers too, which are not set here
            if weight.is_floating_point():
                weight.copy_(torch.randn(weight.shape) * 0.1)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def text_encoder() -> comfy.sd.CLIP:
    """Stable Diffusion 1's CLIP as ComfyUI builds it, of its full size, with random weights."""
    import comfy.sd1_clip

    torch.manual_seed(1)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in clip.cond_stage_model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
    device = torch.device("cpu")
    clip.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, load_device=device, offload_device=device)
    clip.tokenizer, clip.layer_idx, clip.tokenizer_options = None, None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip


def expected(adapter, names: dict, weights: dict, components: tuple[str, ...], strength: float) -> dict:
    """The weights with an adapter's changes in them, by ComfyUI's keys."""
    wanted = {name: weight.clone() for name, weight in weights.items()}
    for component in components:
        for name, layer in adapter.layers.get(component, {}).items():
            target = names[key("comfyui", component, name)]
            weight = wanted[target if isinstance(target, str) else target[0]]
            if not isinstance(target, str) and target[1] is not None:
                weight = weight.narrow(*target[1])
            weight += strength * adapter.configs[component].scaling * layer.delta().reshape(weight.shape)
    return wanted


def patched(patcher) -> dict:
    patcher.patch_model(device_to=torch.device("cpu"))
    found = {name: weight.clone() for name, weight in patcher.model.state_dict().items()}
    patcher.unpatch_model(device_to=torch.device("cpu"))
    return found


def worst(found: dict, wanted: dict, before: dict) -> float:
    """The largest error of a weight, relative to the largest change of one."""
    changes = max(float((wanted[n] - before[n]).abs().max()) for n in wanted)
    return max(float((found[n] - wanted[n]).abs().max()) for n in wanted) / changes


def main() -> dict:
    warnings = Warnings()
    model = tiny_model()
    warnings.lines.clear()
    logging.getLogger().addHandler(warnings)
    adapter = read_stored(folder / "s2ft.safetensors")
    clip = text_encoder() if "text_encoder" in adapter.layers else None
    denoiser = "unet" if "unet" in adapter.layers else "transformer"
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    before = {n: w.clone() for n, w in model.model.state_dict().items()}
    wanted = expected(adapter, names, before, (denoiser,), 0.7)
    if clip is not None:
        clip_names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        clip_before = {n: w.clone() for n, w in clip.cond_stage_model.state_dict().items()}
        clip_wanted = expected(adapter, clip_names, clip_before, ("text_encoder",), 0.6)
    results = {}

    def compare(label: str, one, other) -> None:
        results[label] = {"model": worst(patched(one), wanted, before)}
        if clip is not None:
            results[label]["clip"] = worst(patched(other.patcher), clip_wanted, clip_before)

    for path in sorted(folder.glob("*.safetensors")):
        if path.stem == "s2ft":
            continue
        lora = comfy.utils.load_torch_file(str(path), safe_load=True)
        one, other = comfy.sd.load_lora_for_models(model, clip, lora, 0.7, 0.6)
        compare(path.stem, one, other)

    import folder_paths

    folder_paths.add_model_folder_path("s2ft", str(folder))
    import comfyui.nodes as nodes

    label = next(x for x in nodes.labels() if x.startswith("s2ft.safetensors"))
    one, other, words = nodes.LoadS2FT().load(model, label, 0.7, 0.6, clip)
    kept = sum(
        getattr(x, f).numel() * getattr(x, f).element_size()
        for patches in one.patches.values()
        for _, patch, *_ in patches
        for x in patch.weights
        for f in getattr(x, "__dataclass_fields__", ())
        if isinstance(getattr(x, f), torch.Tensor)
    )
    compare("node", one, other)
    results["node"] |= {"label": label, "words": words, "kept": kept}
    same = all(torch.equal(w, before[n]) for n, w in model.model.state_dict().items())
    return {"results": results, "warnings": warnings.lines, "unchanged": same}


with torch.no_grad():
    found = main()
print("RESULT " + json.dumps(found))
