"""Sana: flow matching on the 32-fold compressed latents of a deterministic autoencoder, a Gemma text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from .family import Conditions, Configs, Family, blank_words


class Sana(Family):
    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    max_tokens = 300
    call_options: ClassVar = {"use_resolution_binning": False}

    @classmethod
    def scale(cls, configs: Configs) -> int:
        return 2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1)

    @classmethod
    def multiple(cls, configs: Configs) -> int:
        """The pipeline takes sides of multiples of 32, whatever its autoencoder does."""
        return max(32, cls.scale(configs))

    @classmethod
    def flow_scheduler(cls, config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
        """The pipeline samples by DPM-Solver++, whose config calls the shift `flow_shift`."""
        steps, shift = config.get("num_train_timesteps", 1000), config.get("flow_shift", config.get("shift", 1.0))
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        return blank_words(cls.max_tokens, configs["transformer"]["caption_channels"])

    def encode_prompt(self, prompt: str) -> Conditions:
        defaults = self.call_defaults()
        words, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.tokens,
            clean_caption=defaults["clean_caption"],
            complex_human_instruction=defaults["complex_human_instruction"],
        )
        return {"encoder_hidden_states": words, "encoder_attention_mask": mask}

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent[0]
        return mean, torch.zeros_like(mean)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return denoiser(
            noisy.to(conditions["encoder_hidden_states"].dtype),
            **conditions,
            timestep=timesteps * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
