"""PixArt-Sigma: prediction of noise, and of its variance in channels that training leaves alone; a T5 text encoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from .family import Conditions, Configs, blank_words
from .stable_diffusion import NoiseFamily


class PixArtSigma(NoiseFamily):
    pipeline_class = "PixArtSigmaPipeline"
    denoiser_class = "PixArtTransformer2DModel"
    max_tokens = 300
    pack = 2
    call_options: ClassVar = {"use_resolution_binning": False}

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        return blank_words(cls.max_tokens, configs["transformer"]["caption_channels"])

    def encode_prompt(self, prompt: str) -> Conditions:
        words, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.tokens,
            clean_caption=self.call_defaults()["clean_caption"],
        )
        return {"encoder_hidden_states": words, "encoder_attention_mask": mask}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        prediction = denoiser(
            noisy.to(conditions["encoder_hidden_states"].dtype),
            **conditions,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return prediction.chunk(2, dim=1)[0] if prediction.shape[1] == 2 * noisy.shape[1] else prediction
