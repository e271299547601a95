"""S2FT adapters and LoRAs on one pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict

from s2ft_diffusion import S2FTConfig, attention_targets
from tests.conftest import copy_of, generate, same_state, state
from tests.random_adapters import ROPE


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


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_saves_and_swaps_as_without_s2ft(pipe, folder, tmp_path, lora_first) -> None:
    """S2FT's layers lie within LoRA's, whichever came first: LoRA's tensors have the names that diffusers knows."""
    path, _ = folder
    for seed, name in enumerate(("one", "two")):
        other = copy_of(pipe)
        torch.manual_seed(seed)
        lora = LoraConfig(target_modules=["to_q", "to_k"], r=2, lora_alpha=2, init_lora_weights=False)
        other.unet.add_adapter(lora)
        layers = get_peft_model_state_dict(other.unet)
        StableDiffusionPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=layers)
    alone = generate(other)
    loads = [
        lambda: pipe.load_lora_weights(tmp_path / "one", adapter_name="lora"),
        lambda: pipe.load_s2ft_weights(path, adapter_name="s2ft"),
    ]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.load_lora_weights(tmp_path / "two", adapter_name="lora", hotswap=True)
    pipe.set_adapters("lora")
    torch.testing.assert_close(generate(pipe), alone, rtol=1e-5, atol=1e-5)
    saved = get_peft_model_state_dict(pipe.unet, adapter_name="lora")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "again", unet_lora_layers=saved)
    again = copy_of(other)
    again.unload_lora_weights()
    again.load_lora_weights(tmp_path / "again")
    torch.testing.assert_close(generate(again), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["sab", "asb", "abs"])
def test_two_loras_and_s2ft_on_flux(tmp_path, order) -> None:
    """diffusers looks for weights of FLUX.1 by the names that they have beneath LoRA layers alone."""

    def model() -> FluxPipeline:
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=16, **ROPE
        )
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)

    for name in "ab":
        pipe = model()
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipe.save_lora_weights(tmp_path / name, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe = model()
    config = S2FTConfig(target_modules=attention_targets(pipe.transformer), n_frequency=50, init_weights=False)
    pipe.transformer.add_adapter(config, "s")
    pipe.save_s2ft_weights(tmp_path / "s")
    pipe = model()
    for name in order:
        load = pipe.load_s2ft_weights if name == "s" else pipe.load_lora_weights
        load(tmp_path / name, adapter_name=name)
        assert pipe.get_active_adapters() == [name]
    assert sorted(pipe.get_list_adapters()["transformer"]) == ["a", "b", "s"]
