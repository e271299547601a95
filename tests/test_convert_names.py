"""What other programs go by: names, kernels and metadata of a LoRA's file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from s2ft_diffusion import AdapterInfo, attention_targets, convert
from s2ft_diffusion.adapters.file import AdapterFileError, read_adapter, write_adapter
from s2ft_diffusion.adapters.lora import to_lora
from s2ft_diffusion.adapters.lora_files import state_dict
from s2ft_diffusion.adapters.tool_names import sdxl_native
from tests.random_adapters import random_adapter, random_layer, some_targets

LINEAR = ("lora_down.weight", "lora_up.weight", "alpha")
TABLE = {
    ("sd15", "kohya", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"):
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    ("sd15", "comfyui", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"):
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
    ("sd15", "kohya", "up_blocks.1.resnets.2.conv_shortcut"): "lora_unet_up_blocks_1_resnets_2_conv_shortcut",
    ("sd15", "lora", "up_blocks.1.resnets.2.conv1"): "unet.up_blocks.1.resnets.2.conv1",
    ("sd15", "peft", "up_blocks.1.resnets.2.conv1"): "base_model.model.up_blocks.1.resnets.2.conv1",
    ("sdxl", "kohya", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"):
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
    ("sdxl", "comfyui", "mid_block.resnets.1.conv2"): "lora_unet_middle_block_2_out_layers_3",
    ("sdxl", "kohya", "up_blocks.0.upsamplers.0.conv"): "lora_unet_output_blocks_2_2_conv",
    ("sdxl", "kohya", "down_blocks.0.downsamplers.0.conv"): "lora_unet_input_blocks_3_0_op",
    ("sd3", "comfyui", "transformer_blocks.0.attn.add_k_proj"): "transformer.transformer_blocks.0.attn.add_k_proj",
    ("flux", "comfyui", "single_transformer_blocks.0.attn.to_v"): "transformer.single_transformer_blocks.0.attn.to_v",
    ("flux2", "comfyui", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"):
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    ("qwen", "lora", "transformer_blocks.0.attn.to_q"): "transformer.transformer_blocks.0.attn.to_q",
    ("zimage", "comfyui", "layers.0.attention.to_q"): "transformer.layers.0.attention.to_q",
}  # fmt: skip


@pytest.mark.parametrize(("place", "wanted"), TABLE.items(), ids=lambda x: "-".join(x[:2]) if len(x) == 3 else None)
def test_names_shapes_and_alphas(denoisers, place, wanted) -> None:
    family, tool, name = place
    component = "unet" if family in ("sd15", "sdxl") else "transformer"
    model = denoisers[family]
    # beside a cross-attention layer, which says what the base is
    beside = [n for n in attention_targets(model) if n.endswith("attn2.to_v")][:1]
    adapter = random_adapter({component: model}, {component: list(dict.fromkeys([name, *beside]))})
    lora, _ = to_lora(adapter, kernels=adapter.kernels)
    tensors = state_dict(lora, tool)
    weight = model.get_submodule(name).weight
    kernel = tuple(weight.shape[2:])
    ends = (
        LINEAR if tool == "kohya" or (tool == "comfyui" and component == "unet") else ("lora_A.weight", "lora_B.weight")
    )
    assert {key.removeprefix(wanted + ".") for key in tensors if key.startswith(wanted + ".")} == set(ends)
    assert tuple(tensors[f"{wanted}.{ends[0]}"].shape) == (3, *weight.shape[1:])
    assert tuple(tensors[f"{wanted}.{ends[1]}"].shape) == (weight.shape[0], 3, *[1] * len(kernel))
    if "alpha" in ends:
        assert float(tensors[f"{wanted}.alpha"]) == 3


def test_names_of_text_encoders(pipe) -> None:
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = random_adapter(models, {"unet": [], "text_encoder": attention_targets(pipe.text_encoder)[:1]})
    layer = adapter.layers["text_encoder"]
    (name,) = layer
    assert name.startswith("text_model.encoder.layers.0.self_attn.")
    projection = name.rpartition(".")[2]
    lora, _ = to_lora(adapter)
    assert f"lora_te_text_model_encoder_layers_0_self_attn_{projection}.alpha" in state_dict(lora, "kohya")
    for tool in ("lora", "comfyui"):
        assert f"text_encoder.{name}.lora_A.weight" in state_dict(lora, tool)
    lora.layers["text_encoder_2"] = lora.layers["text_encoder"]
    assert {key[:8] for key in state_dict(lora, "kohya")} == {"lora_te1", "lora_te2"}
    lora.layers = {"text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q": lora.layers["text_encoder_2"][name]}}
    for tool in ("kohya", "comfyui"):
        with pytest.raises(ValueError, match=r"text_encoder_2\.encoder\.block\.0.*no layer of a CLIP"):
            state_dict(lora, tool)


def test_all_of_sdxl_has_native_names_of_its_own(denoisers) -> None:
    layers = attention_targets(denoisers["sdxl"], "all")
    assert len({sdxl_native(name) for name in layers}) == len(layers) > 100
    with pytest.raises(ValueError, match="no layer of Stable Diffusion XL"):
        sdxl_native("transformer_blocks.0.attn.to_q")


def test_a_transformer_has_no_names_of_kohyas(denoisers) -> None:
    adapter = random_adapter({"transformer": denoisers["flux"]})
    with pytest.raises(ValueError, match=r"transformer\..*: kohya's names .* use comfyui"):
        state_dict(to_lora(adapter)[0], "kohya")


def test_kernels_of_files_that_do_not_say(denoisers, tmp_path) -> None:
    """Files of earlier releases: by the names, else by the base, else an error that asks for it."""
    unet = denoisers["sd15"]
    adapter = random_adapter({"unet": unet}, {"unet": attention_targets(unet, "all")})
    known = {n: adapter.kernels["unet"].get(n, ()) for n in adapter.layers["unet"]}
    assert convert.find_kernels(adapter)["unet"] == known
    adapter.kernels = {}
    assert convert.find_kernels(adapter)["unet"] == known
    shapes = {"unet": {n: tuple(unet.get_submodule(n).weight.shape) for n in known}}
    alone = "down_blocks.0.attentions.0.proj_in"
    adapter.layers["unet"] = {alone: adapter.layers["unet"][alone]}
    with pytest.raises(ValueError, match="give the base model"):
        convert.find_kernels(adapter)
    assert convert.find_kernels(adapter, shapes)["unet"] == {alone: (1, 1)}
    sdxl = random_adapter({"unet": denoisers["sdxl"]}, {"unet": attention_targets(denoisers["sdxl"], "all")})
    known = {n: sdxl.kernels["unet"].get(n, ()) for n in sdxl.layers["unet"]}
    sdxl.kernels = {}
    assert convert.find_kernels(sdxl)["unet"] == known


@pytest.mark.parametrize("kernel", [[3], [3, 0], "33", [2, 2], [1, 1, 1, 1]])
def test_a_wrong_kernel_in_a_file(tmp_path, denoisers, kernel) -> None:
    name = "down_blocks.0.resnets.0.conv1"
    adapter = random_adapter({"unet": denoisers["sd15"]}, {"unet": [name]})
    write_adapter(tmp_path / "a", adapter)
    assert read_adapter(tmp_path / "a").kernels == {"unet": {name: (3, 3)}}
    adapter.kernels["unet"][name] = kernel
    if kernel == [3]:  # which may be a convolution of one dimension
        write_adapter(tmp_path / "a", adapter)
        assert read_adapter(tmp_path / "a").kernels == {"unet": {name: (3,)}}
        return
    if kernel == [2, 2]:
        adapter.layers["unet"][name] = random_layer((32, 27), torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "a", adapter)
    with pytest.raises(AdapterFileError, match="header is damaged"):
        read_adapter(tmp_path / "a")


def test_metadata(tmp_path, denoisers) -> None:
    info = AdapterInfo("a/base", "a photo of sks dog", "rex", "dog", "2026-01-02", {"steps": 300, "resolution": 512})
    info.thumbnail = b"RIFF"
    unet = denoisers["sd15"]
    adapter = random_adapter({"unet": unet}, some_targets(unet), info=info)
    write_adapter(tmp_path / "a", adapter)
    convert.convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        found = file.metadata()
    assert json.loads(found.pop("ss_tag_frequency")) == {"rex": {"a photo of sks dog": 1}}
    assert found.pop("modelspec.thumbnail") == "data:image/webp;base64,UklGRg=="
    assert float(found.pop("ss_training_started_at")) > 0
    assert found == {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "3",
        "ss_output_name": "rex", "ss_sd_model_name": "a/base", "ss_base_model_version": "sd_v1", "ss_v2": "False",
        "ss_resolution": "(512, 512)", "ss_steps": "300", "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
        "modelspec.title": "rex", "modelspec.resolution": "512x512", "modelspec.date": "2026-01-02",
        "modelspec.description": "S2FT adapter of a dog, as a LoRA", "modelspec.trigger_phrase": "a photo of sks dog",
    }  # fmt: skip
