"""Z-Image: flow matching; its denoiser takes lists, counts time upwards and predicts the negative."""

from __future__ import annotations

import torch
from torch import nn

from .family import Conditions, Configs, Family


class ZImage(Family):
    pipeline_class = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    pack = 2

    @classmethod
    def default_side(cls, configs: Configs) -> int:
        return 1024

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        """A prompt of 64 tokens: they are as many as it has."""
        return {"words": [torch.zeros(64, configs["transformer"]["cap_feat_dim"])]}

    def encode_prompt(self, prompt: str) -> Conditions:
        words, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.tokens
        )
        return {"words": words}

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()[0]
        return mean, torch.zeros_like(mean)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        words = conditions["words"]
        latents = list(noisy.to(words[0].dtype)[:, :, None].unbind(0))
        prediction = denoiser(latents, (1000 - timesteps) / 1000, words, return_dict=False)[0]
        return -torch.stack([each.float() for each in prediction])[:, :, 0]
