"""FLUX.2 and FLUX.2 klein: flow matching on patches of latents, normalised by the autoencoder's batch norm."""

from __future__ import annotations

import math

import torch
from torch import nn

from .family import Conditions, Configs, Family


class Flux2(Family):
    pipeline_class = "Flux2Pipeline"
    denoiser_class = "Flux2Transformer2DModel"
    negative_prompt = None
    pack = 2
    default_latents = 128

    @classmethod
    def latent_shape(cls, configs: Configs, side: int) -> tuple[int, int, int]:
        channels, height, width = super().latent_shape(configs, side)
        return (channels * 4, height // 2, width // 2)

    @classmethod
    def dynamic_shift(cls, configs: Configs, shape: tuple[int, int, int]) -> float:
        """Of as many steps as the pipeline's call takes: its shift depends on them."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(shape[-2] * shape[-1], cls.sampling().steps)

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        words = torch.zeros(1, cls.max_tokens, configs["transformer"]["joint_attention_dim"])
        return {"encoder_hidden_states": words, "txt_ids": torch.zeros(1, cls.max_tokens, 4, dtype=torch.int64)}

    def encode_prompt(self, prompt: str) -> Conditions:
        words, ids = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=self.tokens)
        return {"encoder_hidden_states": words, "txt_ids": ids}

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mode = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        mean = self.pipeline._patchify_latents(mode)[0]
        return mean, torch.zeros_like(mean)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        norm = self.vae.bn
        mean, variance = (value.view(-1, 1, 1).to(latents) for value in (norm.running_mean, norm.running_var))
        return (latents - mean) / torch.sqrt(variance + self.vae.config.batch_norm_eps)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        dtype = conditions["encoder_hidden_states"].dtype
        prediction = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy.to(dtype)),
            timestep=timesteps.to(dtype) / 1000,
            guidance=self.told_guidance(noisy),
            **conditions,
            img_ids=self.pipeline._prepare_latent_ids(noisy).to(noisy.device),
            return_dict=False,
        )[0]
        return prediction.permute(0, 2, 1).reshape(noisy.shape)

    def spatial(self, latents: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(latents.shape[1])
        return latents.permute(0, 2, 1).reshape(len(latents), -1, side, side)


class Flux2Klein(Flux2):
    pipeline_class = "Flux2KleinPipeline"
