"""Lumina Image 2: flow matching; its denoiser counts time upwards and predicts the negative; a Gemma text encoder."""

from __future__ import annotations

import torch
from torch import nn

from .family import Conditions, Configs, Family, blank_words


class Lumina2(Family):
    pipeline_class = "Lumina2Pipeline"
    denoiser_class = "Lumina2Transformer2DModel"
    max_tokens = 256
    pack = 2

    @classmethod
    def dynamic_shift(cls, configs: Configs, shape: tuple[int, int, int]) -> float:
        """The pipeline counts channels as its tokens."""
        return super().dynamic_shift(configs, (1, cls.pack * shape[0], cls.pack))

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        return blank_words(cls.max_tokens, configs["transformer"]["cap_feat_dim"])

    def encode_prompt(self, prompt: str) -> Conditions:
        words, mask, _, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": words, "encoder_attention_mask": mask}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        prediction = denoiser(
            hidden_states=noisy.to(conditions["encoder_hidden_states"].dtype),
            timestep=1 - timesteps / 1000,
            **conditions,
            return_dict=False,
        )[0]
        return -prediction
