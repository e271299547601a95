"""FLUX.1: flow matching on packed latents; dev is told its guidance."""

from __future__ import annotations

import math

import torch
from torch import nn

from .family import Conditions, Configs, Family


class Flux(Family):
    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder",)
    negative_prompt = None
    pack = 2
    default_latents = 128

    @classmethod
    def check(cls, configs: Configs) -> str | None:
        if configs["transformer"]["in_channels"] != 4 * configs["vae"]["latent_channels"]:
            return "it is no text-to-image FLUX.1"
        return None

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        words, pooled = (configs["transformer"][name] for name in ("joint_attention_dim", "pooled_projection_dim"))
        return {
            "encoder_hidden_states": torch.zeros(1, cls.max_tokens, words),
            "pooled_projections": torch.zeros(1, pooled),
        }

    def encode_prompt(self, prompt: str) -> Conditions:
        words, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, device=self.device, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": words, "pooled_projections": pooled}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        words = conditions["encoder_hidden_states"]
        count, channels, height, width = noisy.shape
        prediction = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy.to(words.dtype), count, channels, height, width),
            timestep=timesteps.to(words.dtype) / 1000,
            guidance=self.told_guidance(noisy),
            **conditions,
            txt_ids=torch.zeros(words.shape[1], 3, device=words.device, dtype=words.dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, words.dtype),
            return_dict=False,
        )[0]
        return self._unpack(prediction, height, width)

    def spatial(self, latents: torch.Tensor) -> torch.Tensor:
        side = 2 * math.isqrt(latents.shape[1])
        return self._unpack(latents, side, side)

    def _unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        scale = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(latents, height * scale, width * scale, scale)
