"""Attention projections are found in models of any naming."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from s2ft_diffusion import S2FTConfig, S2FTLinear, attention_targets
from s2ft_diffusion.tuner.delta import trained_numbers


@pytest.fixture(scope="module")
def sd15_unet() -> UNet2DConditionModel:
    """The shapes of Stable Diffusion 1.5's denoiser, without memory for its weights."""
    with init_empty_weights():
        return UNet2DConditionModel(cross_attention_dim=768, sample_size=64)


def test_the_papers_setting_on_stable_diffusion(sd15_unet) -> None:
    assert sum(p.numel() for p in sd15_unet.parameters()) == 859_520_964
    names = attention_targets(sd15_unet, "qv")
    assert len(names) == len(set(names)) == 64
    assert len(attention_targets(sd15_unet, "attention")) == 128
    numbers, paper = 0, S2FTConfig.from_preset("paper")
    for name in names:
        layer = sd15_unet.get_submodule(name)
        numbers += trained_numbers((layer.out_features, layer.in_features), paper, 8000)
    assert numbers == 512_000


def test_blocks_are_attention_and_feed_forward(sd15_unet, pipe) -> None:
    names = attention_targets(sd15_unet, "blocks")
    assert len(names) == len(set(names)) == 128 + 16 * 2
    assert set(names) > set(attention_targets(sd15_unet, "attention"))
    feed_forward = [name for name in names if ".ff.net." in name]
    assert len(feed_forward) == 32
    text_encoder = pipe.text_encoder
    layers = text_encoder.config.num_hidden_layers
    assert len(attention_targets(text_encoder, "blocks")) == 6 * layers  # fc1 and fc2 as well
    text_encoder.add_adapter(S2FTConfig(target_modules=attention_targets(text_encoder), n_frequency=20))
    assert len(attention_targets(text_encoder, "blocks")) == 6 * layers  # the same layers beside an adapter
    with pytest.raises(ValueError, match=r"'blocks'.*got 'block'"):
        attention_targets(sd15_unet, "block")


def test_transformers_of_diffusers() -> None:
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    # to_q, to_v, add_q_proj and add_v_proj in each block, but for the last add_q_proj, whose result nothing reads
    assert len(attention_targets(sd3)) == 2 * 4 - 1
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    around = {name.rpartition("blocks.0.")[2] for name in attention_targets(flux, "blocks") if ".attn." not in name}
    feed_forward = {f"{ff}.net.{place}" for ff in ("ff", "ff_context") for place in ("0.proj", "2")}
    assert around == feed_forward | {"proj_mlp", "proj_out"}  # of the single block; nothing of the norms
    names = attention_targets(flux)
    assert len(names) == 4 + 2
    flux.add_adapter(S2FTConfig(target_modules=names, n_frequency=20))
    assert sum(isinstance(m, S2FTLinear) for m in flux.modules()) == 6


def test_text_encoder(pipe) -> None:
    assert len(attention_targets(pipe.text_encoder, "qv")) == 2 * pipe.text_encoder.config.num_hidden_layers
    assert len(attention_targets(pipe.text_encoder, "attention")) == 4 * pipe.text_encoder.config.num_hidden_layers


def test_nothing_to_adapt_and_fused(pipe) -> None:
    with pytest.raises(ValueError, match="Linear has no attention projections"):
        attention_targets(torch.nn.Linear(2, 2))
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        attention_targets(pipe.unet)
