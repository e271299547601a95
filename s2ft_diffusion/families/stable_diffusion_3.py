"""Stable Diffusion 3 and 3.5: flow matching, two CLIP text encoders and a T5."""

from __future__ import annotations

import torch
from torch import nn

from .family import Conditions, Configs, Family


class StableDiffusion3(Family):
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    max_tokens = 256
    weighting_scheme = "logit_normal"

    @classmethod
    def multiple(cls, configs: Configs) -> int:
        return cls.scale(configs) * configs["transformer"]["patch_size"]

    @classmethod
    def dynamic_shift(cls, configs: Configs, shape: tuple[int, int, int]) -> float:
        patch = configs["transformer"]["patch_size"]
        return super().dynamic_shift(configs, (shape[0], shape[1] // patch, shape[2] // patch))

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        words, pooled = (configs["transformer"][name] for name in ("joint_attention_dim", "pooled_projection_dim"))
        return {
            "encoder_hidden_states": torch.zeros(1, 77 + cls.max_tokens, words),
            "pooled_projections": torch.zeros(1, pooled),
        }

    def encode_prompt(self, prompt: str) -> Conditions:
        words, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": words, "pooled_projections": pooled}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        dtype = conditions["encoder_hidden_states"].dtype
        return denoiser(hidden_states=noisy.to(dtype), timestep=timesteps.to(dtype), **conditions, return_dict=False)[0]
