"""kohya's and ComfyUI's files in the own code of sd-scripts, Forge and A1111.

S2FT_SD_SCRIPTS, S2FT_FORGE and S2FT_A1111 name checkouts; S2FT_SD_SCRIPTS_PYTHON and so on may name Pythons that have
what they need. A1111's checkout has the repositories that its first start clones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from s2ft_diffusion import attention_targets, convert
from s2ft_diffusion.adapters.file import write_adapter
from tests.random_adapters import random_adapter, tiny_denoisers

SD_SCRIPTS, FORGE, A1111 = (os.environ.get(f"S2FT_{name}") for name in ("SD_SCRIPTS", "FORGE", "A1111"))
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
# Stable Diffusion XL's U-Net: sd-scripts has it in one size alone.
XL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def drive(name: str, checkout: str, *arguments: str) -> dict[str, Any]:
    """What a driver says, run by the Python that its program needs."""
    python = os.environ.get(f"S2FT_{name.upper()}_PYTHON", sys.executable)
    driver = Path(__file__).parent / f"{name}_driver.py"
    command = [python, str(driver), str(Path(checkout).resolve()), *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT ")[1])


def write_files(folder: Path, family: str, tools: tuple[str, ...], *, encoders: bool = False) -> int:
    """An adapter of random numbers for a family, and conversions of it; returns how many layers it has."""
    component = "transformer" if family == "flux" else "unet"
    if family == "sdxl full":
        with torch.device("meta"):
            models = {component: diffusers.UNet2DConditionModel(**XL)}
    else:
        models = {component: tiny_denoisers()[family]}
    with torch.device("meta"):
        if family == "sd15" or encoders:
            models["text_encoder"] = CLIPTextModel(CLIPTextConfig(**CLIP))
        if encoders and family == "sdxl":
            models["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP))
    targets = {c: attention_targets(m, "blocks" if c.startswith("text") else "all") for c, m in models.items()}
    adapter = random_adapter(models, targets)
    write_adapter(folder / "s2ft.safetensors", adapter)
    for tool in tools:
        convert.convert(folder / "s2ft.safetensors", folder / f"{tool}.safetensors", to=tool, dtype="float32")
    return sum(len(layers) for layers in adapter.layers.values())


@pytest.mark.skipif(not SD_SCRIPTS, reason="S2FT_SD_SCRIPTS names no checkout of sd-scripts")
def test_in_sd_scripts(tmp_path) -> None:
    """sd-scripts makes a LoRA module of every layer of the file, and its merged weights are the sums."""
    layers = write_files(tmp_path, "sd15", ("kohya",))
    found = drive("sd_scripts", SD_SCRIPTS, "sd15", str(tmp_path))
    assert found["missed"] == []
    assert found["made"] == layers
    assert found["unet"] < 1e-5
    assert found["text_encoder"] < 1e-5


@pytest.mark.skipif(not SD_SCRIPTS, reason="S2FT_SD_SCRIPTS names no checkout of sd-scripts")
def test_names_in_sd_scripts_of_stable_diffusion_xl(tmp_path) -> None:
    layers = write_files(tmp_path, "sdxl full", ("kohya",))
    found = drive("sd_scripts", SD_SCRIPTS, "sdxl", str(tmp_path))
    assert found["missed"] == []
    assert found["made"] == layers


@pytest.mark.skipif(not SD_SCRIPTS, reason="S2FT_SD_SCRIPTS names no checkout of sd-scripts")
def test_flux_in_sd_scripts(tmp_path) -> None:
    """Its own converter renames diffusers' names, with query, key and value in one; merged, weights are the sums."""
    write_files(tmp_path, "flux", ("lora",))
    found = drive("sd_scripts", SD_SCRIPTS, "flux", str(tmp_path))
    assert found["missed"] == []
    assert found["transformer"] < 1e-5


@pytest.mark.skipif(not FORGE, reason="S2FT_FORGE names no checkout of Forge")
@pytest.mark.parametrize(
    ("family", "tools"), [("sd15", ("kohya", "comfyui")), ("sdxl", ("kohya", "comfyui")), ("flux", ("comfyui",))]
)
def test_in_forge(tmp_path, family, tools) -> None:
    """Every key is used, and what Forge's patcher makes of its own models' weights is the sums."""
    write_files(tmp_path, family, tools)
    found = drive("forge", FORGE, family, str(tmp_path))
    assert set(found) == set(tools)
    for result in found.values():
        assert result.pop("left") == []
        assert all(error < 1e-5 for error in result.values()), result


@pytest.mark.skipif(not A1111, reason="S2FT_A1111 names no checkout of A1111")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_in_a1111(tmp_path, family) -> None:
    """Its extension uses every key, changes weights by the sums and no others, and takes the file for this base."""
    layers = write_files(tmp_path, family, ("kohya",), encoders=True)
    found = drive("a1111", A1111, family, str(tmp_path))
    assert found["missed"] == []
    assert found["made"] == found["layers"] == layers
    assert found["error"] < 1e-5
    assert found["complaints"] == {}
    assert found["unchanged"]
    assert found["version"] == {"sd15": "SD1", "sdxl": "SDXL"}[family]
