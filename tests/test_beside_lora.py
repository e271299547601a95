"""S2FT adapters and LoRAs on one pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict

from tests.conftest import copy_of, generate, same_state, state


def test_fuse_beside_a_fused_lora(pipe, folder) -> None:
    path, _ = folder
    pipe.load_s2ft_weights(path)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False), "lora")
    pipe.set_adapters(["s2ft_0", "lora"])
    both = generate(pipe)
    pipe.fuse_s2ft()
    pipe.unet.fuse_lora(adapter_names=["lora"])
    torch.testing.assert_close(generate(pipe), both, rtol=1e-3, atol=1e-3)
    pipe.unfuse_s2ft()  # something else changed the weights meanwhile: the delta is subtracted
    torch.testing.assert_close(generate(pipe), both, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lora_first", [True, False])
def test_loras_before_and_after(pipe, folder, tmp_path, lora_first) -> None:
    path, expected = folder
    other = copy_of(pipe)
    other.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], r=2, lora_alpha=2, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(other.unet))
    lora_alone = generate(other)
    loads = [lambda: pipe.load_lora_weights(tmp_path / "lora"), lambda: pipe.load_s2ft_weights(path)]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.set_adapters(["s2ft_0"])
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    lora_name = next(n for n in pipe.get_list_adapters()["unet"] if n != "s2ft_0")
    pipe.set_adapters([lora_name])
    torch.testing.assert_close(generate(pipe), lora_alone, rtol=1e-4, atol=1e-4)
    pipe.set_adapters(["s2ft_0", lora_name])
    both = generate(pipe)
    assert not torch.allclose(both, expected)
    pipe.unload_s2ft_weights()
    torch.testing.assert_close(generate(pipe), lora_alone, rtol=1e-4, atol=1e-4)
    pipe.load_s2ft_weights(path)
    pipe.set_adapters(["s2ft_0", lora_name])
    torch.testing.assert_close(generate(pipe), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lora_first", [True, False])
def test_unloading_loras_keeps_s2ft(pipe, folder, lora_first, fused) -> None:
    """diffusers strips every PEFT layer; ours come back, with their weights, and fused ones can still be unfused."""
    path, expected = folder
    before = state(pipe)
    lora = LoraConfig(target_modules=["to_q", "to_k"], r=2, init_lora_weights=False)
    loads = [lambda: pipe.unet.add_adapter(lora, "lora"), lambda: pipe.load_s2ft_weights(path)]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.set_adapters(["s2ft_0", "lora"], [0.5, 1.0])
    if fused:
        pipe.fuse_s2ft()
    pipe.unload_lora_weights()
    if fused:
        pipe.unfuse_s2ft()
    half = generate(pipe)
    assert not torch.equal(half, expected)
    assert pipe.get_list_adapters() == {"unet": ["s2ft_0"]}
    pipe.set_adapters("s2ft_0", 1.0)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_s2ft_weights()
    assert same_state(pipe, before)
