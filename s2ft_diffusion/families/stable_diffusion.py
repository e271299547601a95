"""Stable Diffusion 1.x and 2.x: a U-Net that predicts noise or velocity, one CLIP text encoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import DDPMScheduler
from torch import nn

from ..dreambooth.settings import LossSettings
from ..errors import InputError
from .family import Conditions, Configs, Family
from .objectives import NoiseObjective, Objective


class NoiseFamily(Family):
    """Families that predict noise, velocity or latents on a scheduler of discrete timesteps."""

    samplers = True

    @classmethod
    def objective(cls, configs: Configs, shape: tuple[int, int, int], settings: LossSettings) -> Objective:
        """The loss of the scheduler's kind of prediction."""
        if settings.weighting_scheme is not None:
            raise InputError(f"--weighting_scheme is for bases of flow matching, not for {cls.pipeline_class}.")
        return NoiseObjective(DDPMScheduler.from_config(dict(configs["scheduler"])), settings.snr_gamma)


class StableDiffusion(NoiseFamily):
    pipeline_class = "StableDiffusionPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    trainable_text_encoders = ("text_encoder",)
    max_tokens = None
    compared_by = "DDIMScheduler"
    load_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    @classmethod
    def check(cls, configs: Configs) -> str | None:
        unet = configs["unet"]
        if unet.get("addition_embed_type") or unet["in_channels"] != configs["vae"]["latent_channels"]:
            return "it is no text-to-image Stable Diffusion 1.x or 2.x"
        return None

    @classmethod
    def multiple(cls, configs: Configs) -> int:
        return cls.scale(configs) * 2 ** (len(configs["unet"]["block_out_channels"]) - 1)

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        return {"encoder_hidden_states": torch.zeros(1, 77, configs["unet"]["cross_attention_dim"])}

    def encode_prompt(self, prompt: str) -> Conditions:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompt, self.device, 1, False)[0]}

    def words(self, prompt: str, negative_prompt: str, guidance: float) -> dict[str, torch.Tensor | None]:
        """Encoded: the pipeline takes embeddings as well."""
        words, negative = self.pipeline.encode_prompt(prompt, self.device, 1, guidance > 1, negative_prompt or None)
        return {"prompt_embeds": words, "negative_prompt_embeds": negative}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        words = conditions["encoder_hidden_states"]
        return denoiser(noisy.to(words.dtype), timesteps, words, return_dict=False)[0]
