"""Stable Diffusion XL: a U-Net that is also told sizes and a pooled text; some variants are trained as EDM."""

from __future__ import annotations

import torch
from diffusers import EDMEulerScheduler
from torch import nn

from ..dreambooth.settings import LossSettings
from ..errors import InputError
from .family import Conditions, Configs
from .objectives import EDMObjective, Objective
from .stable_diffusion import NoiseFamily, StableDiffusion


class StableDiffusionXL(NoiseFamily):
    pipeline_class = "StableDiffusionXLPipeline"
    denoiser = "unet"
    denoiser_class = "UNet2DConditionModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    max_tokens = None
    multiple = StableDiffusion.multiple

    @classmethod
    def check(cls, configs: Configs) -> str | None:
        unet = configs["unet"]
        if unet.get("addition_embed_type") != "text_time" or unet["in_channels"] != configs["vae"]["latent_channels"]:
            return "it is no text-to-image Stable Diffusion XL"
        return None

    @classmethod
    def objective(cls, configs: Configs, shape: tuple[int, int, int], settings: LossSettings) -> Objective:
        if "EDM" not in configs["scheduler"]["_class_name"]:
            return super().objective(configs, shape, settings)
        if settings.snr_gamma is not None or settings.weighting_scheme is not None:
            raise InputError("--snr_gamma and --weighting_scheme do nothing for a base that is trained as EDM.")
        return EDMObjective(EDMEulerScheduler.from_config(dict(configs["scheduler"])))

    @classmethod
    def unreachable(cls, component: str, model: nn.Module) -> list[str]:
        """The first text encoder is read before its last layer."""
        if component != "text_encoder":
            return []
        last = model.config.num_hidden_layers - 1
        return [name for name, _ in model.named_modules() if f"layers.{last}." in name]

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        unet = configs["unet"]
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        return {**StableDiffusion.blank_conditions(configs), "text_embeds": torch.zeros(1, pooled)}

    def encode_prompt(self, prompt: str) -> Conditions:
        words, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": words, "text_embeds": pooled}

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return latents * config.scaling_factor
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1).to(latents) for name in ("latents_mean", "latents_std"))
        return (latents - mean) * config.scaling_factor / std

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        words = conditions["encoder_hidden_states"]
        height, width = (size * self.pipeline.vae_scale_factor for size in noisy.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=words.dtype, device=words.device)
        return denoiser(
            noisy.to(words.dtype),
            timesteps,
            encoder_hidden_states=words,
            added_cond_kwargs={"text_embeds": conditions["text_embeds"], "time_ids": sizes.repeat(len(noisy), 1)},
            return_dict=False,
        )[0]
