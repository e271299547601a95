"""Qwen-Image: flow matching on packed latents of a video autoencoder, a Qwen2.5-VL text encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .family import Conditions, Configs, Family


class QwenImage(Family):
    pipeline_class = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    guidance_name = "true_cfg_scale"
    negative_prompt = " "
    pack = 2
    default_latents = 128

    @classmethod
    def scale(cls, configs: Configs) -> int:
        return 2 ** len(configs["vae"]["temperal_downsample"])

    @classmethod
    def latent_shape(cls, configs: Configs, side: int) -> tuple[int, int, int]:
        latents = side // cls.scale(configs)
        return (configs["vae"]["z_dim"], latents, latents)

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        """A prompt of 64 tokens: they are as many as it has."""
        words = torch.zeros(1, 64, configs["transformer"]["joint_attention_dim"])
        return {"encoder_hidden_states": words, "encoder_hidden_states_mask": None}

    def encode_prompt(self, prompt: str) -> Conditions:
        words, mask = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=self.tokens)
        return {"encoder_hidden_states": words, "encoder_hidden_states_mask": mask}

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """Prompts padded to the longest, with a mask if they are not equally long, as the pipeline does."""
        words = [each["encoder_hidden_states"] for each in conditions]
        longest = max(each.shape[1] for each in words)
        mask = torch.zeros(len(words), longest, dtype=torch.long, device=words[0].device)
        for row, each in zip(mask, words, strict=True):
            row[: each.shape[1]] = 1
        padded = torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in words])
        return {"encoder_hidden_states": padded, "encoder_hidden_states_mask": None if mask.all() else mask}

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)[:, :, None]).latent_dist
        return posterior.mean[0, :, 0], posterior.std[0, :, 0]

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = (
            torch.tensor(self.vae.config[name]).view(-1, 1, 1).to(latents) for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) / std

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        dtype = conditions["encoder_hidden_states"].dtype
        count, channels, height, width = noisy.shape
        prediction = denoiser(
            hidden_states=self.pipeline._pack_latents(noisy.to(dtype), count, channels, height, width),
            timestep=timesteps.to(dtype) / 1000,
            guidance=self.told_guidance(noisy),
            **conditions,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return self._unpack(prediction, height, width)

    def spatial(self, latents: torch.Tensor) -> torch.Tensor:
        side = 2 * math.isqrt(latents.shape[1])
        return self._unpack(latents, side, side)

    def _unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        scale = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(latents, height * scale, width * scale, scale)[:, :, 0]
