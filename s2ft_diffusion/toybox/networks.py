"""The networks of the two embedded bases, untrained, and how pictures go into them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from .tokenizer import MAX_LENGTH
from .world import RESOLUTION

LATENT_CHANNELS = 16
LATENT_SIDE = RESOLUTION // 8
UNET_TEXT = {"width": 192, "layers": 3}  # the U-Net base's encoder
FLOW_TEXT = ({"width": 192, "layers": 4}, {"width": 128, "layers": 3})  # the flow base's two
FLOW_TEXT_WIDTH = sum(each["width"] for each in FLOW_TEXT)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images as one (n, 3, height, width) tensor in [-1, 1], channels last in memory."""
    array = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The U-Net base's text encoder."""
    return CLIPTextModel(_text_config(tokenizer, **UNET_TEXT))


def new_projected_text_encoder(tokenizer: CLIPTokenizer, which: int) -> CLIPTextModelWithProjection:
    """The flow base's first (0) or second (1) text encoder."""
    return CLIPTextModelWithProjection(_text_config(tokenizer, **FLOW_TEXT[which]))


def silent_text_encoder(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """The flow base's third text encoder, all zeros: what Stable Diffusion 3 puts where it runs without T5."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=FLOW_TEXT_WIDTH,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = T5EncoderModel(config).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.zero_()
    return encoder.eval()


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=UNET_TEXT["width"],
        attention_head_dim=4,  # the number of heads, by diffusers' historical naming
        norm_num_groups=16,
    )


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=FLOW_TEXT_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=FLOW_TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def new_scheduler() -> DDIMScheduler:
    """The U-Net base's scheduler."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The flow base's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=1.5)
