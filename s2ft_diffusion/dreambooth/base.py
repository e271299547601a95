"""The base model: resolved, checked against the flags by its configs alone, then loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState, init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .. import toybox
from ..pipelines.targets import attention_targets
from ..tuner.config import S2FTConfig
from ..tuner.delta import trained_numbers
from ..tuner.layer import delta_shape
from .errors import InputError
from .settings import AdapterSettings, BaseSettings


@dataclass
class BasePlan:
    """What the configs of a base say, before any weight is loaded: where it is, and whom to adapt how."""

    name: str
    location: str
    resolution: int
    latent_shape: tuple[int, int, int]
    configs: dict[str, S2FTConfig]
    revision: dict[str, str]
    variant: dict[str, str]


def plan_base(settings: BaseSettings, adapter: AdapterSettings, resolution: int | None, seed: int) -> BasePlan:
    """Read the base's configs and check against them what is to be adapted, at which side in pixels.

    Raises InputError for a base that cannot be reached, is no Stable Diffusion 1.x/2.x, a resolution that its
    autoencoder cannot take, and an n_frequency that a layer (named) has no room for.
    """
    name = settings.name
    location, embedded = toybox.resolve(name), toybox.is_embedded(name)
    revision = {"revision": settings.revision} if settings.revision and not embedded else {}
    variant = {"variant": settings.variant} if settings.variant and not embedded else {}
    try:
        unet_config = UNet2DConditionModel.load_config(location, subfolder="unet", **revision)
        vae_config = AutoencoderKL.load_config(location, subfolder="vae", **revision)
        text_config = CLIPTextConfig.from_pretrained(location, subfolder="text_encoder", **revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"The base model {name!r} cannot be loaded ({reason}). Without access to the hub, pass a local folder with "
            "--pretrained_model_name_or_path FOLDER (Stable Diffusion in diffusers' layout), or use the embedded base "
            "with --pretrained_model_name_or_path toybox."
        ) from None
    if unet_config.get("addition_embed_type") or unet_config["in_channels"] != vae_config["latent_channels"]:
        raise InputError(f"{name!r} is no text-to-image Stable Diffusion 1.x or 2.x, which is what this trains.")
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    resolution = resolution or unet_config["sample_size"] * factor
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(unet_config)
        models: dict[str, nn.Module] = {"unet": unet}
        if adapter.train_text_encoder:
            models["text_encoder"] = CLIPTextModel(text_config)
    least = factor * 2 ** (len(unet_config["block_out_channels"]) - 1)
    if resolution % least:
        raise InputError(f"--resolution must be a multiple of {least} for this base, got {resolution}.")
    configs = {}
    for component, model in models.items():
        configs[component] = adapter.config(attention_targets(model, adapter.targets), seed)
        _check_room(component, model, configs[component])
    side = resolution // factor
    latent_shape = (unet_config["in_channels"], side, side)
    return BasePlan(name, location, resolution, latent_shape, configs, revision, variant)


def _check_room(component: str, model: nn.Module, config: S2FTConfig) -> None:
    for name in sorted(config.target_modules):
        layer = model.get_submodule(name)
        try:
            trained_numbers(delta_shape(layer), config, config.n_frequency)
        except ValueError as error:
            raise InputError(f"{component}.{name}: {error}") from None


@dataclass
class Base:
    """The loaded models of a base, frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the models, in one type."""
        for model in (self.vae, self.text_encoder, self.unet):
            model.to(device, dtype)

    def pipeline(self, plan: BasePlan) -> StableDiffusionPipeline:
        """A pipeline around these very models, with the base's own sampling scheduler."""
        return StableDiffusionPipeline.from_pretrained(
            plan.location,
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **plan.revision,
        )


def load_base(plan: BasePlan) -> Base:
    """Load the models in float32, in evaluation mode, with no parameter trainable."""
    revision, weights = plan.revision, {**plan.revision, **plan.variant, "torch_dtype": torch.float32}
    classes = {
        "unet": (UNet2DConditionModel, weights),
        "vae": (AutoencoderKL, weights),
        "text_encoder": (CLIPTextModel, weights),
        "tokenizer": (CLIPTokenizer, revision),
        "scheduler": (DDPMScheduler, revision),
    }
    loaded: dict[str, Any] = {}
    for name, (kind, options) in tqdm(classes.items(), desc="load", disable=not PartialState().is_main_process):
        try:
            loaded[name] = kind.from_pretrained(plan.location, subfolder=name, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip()
            raise InputError(f"The {name} of the base model {plan.name!r} cannot be loaded: {reason}") from None
    for name in ("unet", "vae", "text_encoder"):
        loaded[name].requires_grad_(False).eval()
    return Base(**loaded)
