"""The base model: resolved, checked against the settings by its configs alone, then loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from .. import toybox
from ..errors import InputError
from ..families import Configs, Family, family_of
from ..families.loading import load_pipeline
from ..families.objectives import Objective
from ..families.quantization import Quantization
from ..pipelines.targets import attention_targets, unreachable
from ..tuner.config import S2FTConfig
from ..tuner.delta import trained_numbers
from ..tuner.layer import delta_shape
from .settings import AdapterSettings, BaseSettings, LossSettings


@dataclass(frozen=True)
class BasePlan:
    """What the configs of a base say, before any weight is loaded: its family, where it is, and whom to adapt how.

    `configs` are the adapters' by component, the denoiser's first; `left_out` are layers that the targets would name
    but that cannot reach the base's output. `index` is the base's `model_index.json`, `base_configs` those of denoiser,
    autoencoder and scheduler.
    """

    settings: BaseSettings
    location: str
    family: type[Family]
    resolution: int
    latent_shape: tuple[int, int, int]
    objective: Objective
    configs: Mapping[str, S2FTConfig]
    left_out: tuple[str, ...]
    index: Mapping[str, Any]
    base_configs: Configs

    @property
    def options(self) -> dict[str, str]:
        """What `from_pretrained` takes of a base on the hub."""
        return base_options(self.settings)

    @property
    def revision(self) -> dict[str, str]:
        """Those of them that configs are read with."""
        return {name: value for name, value in self.options.items() if name == "revision"}


def base_options(settings: BaseSettings) -> dict[str, str]:
    """The revision and the variant, where they are given and the base is not the embedded one."""
    given = {"revision": settings.revision, "variant": settings.variant}
    return {name: value for name, value in given.items() if value and not toybox.is_embedded(settings.name)}


def find_family(settings: BaseSettings) -> tuple[type[Family], dict[str, Any]]:
    """A base's family and its `model_index.json`; raises InputError where it is not found or of no known family."""
    options = {key: value for key, value in base_options(settings).items() if key == "revision"}
    try:
        index = DiffusionPipeline.load_config(toybox.resolve(settings.name), **options)
    except (OSError, ValueError) as error:
        raise _no_base(settings.name, error) from None
    return family_of(index, settings.name), index


def _no_base(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"The base model {name!r} cannot be loaded ({reason}). Without access to the hub, pass a local folder with "
        "--pretrained_model_name_or_path FOLDER (in diffusers' layout), or use the embedded base with "
        "--pretrained_model_name_or_path toybox."
    )


def plan_base(
    settings: BaseSettings,
    adapter: AdapterSettings,
    resolution: int | None,
    seed: int,
    loss: LossSettings | None = None,
    *,
    lora: bool = False,
) -> BasePlan:
    """Read the base's configs and check against them what is to be adapted, at which side in pixels, by which loss.

    Raises InputError for a base that cannot be reached or is of no known family, a resolution that its autoencoder
    cannot take, a text encoder that cannot be trained, and an n_frequency that a layer (named) has no room for; with
    `lora`, which is to be written beside the adapter, for a base that reads none and a layer that none has a form for.
    """
    name, location = settings.name, toybox.resolve(settings.name)
    options = {key: value for key, value in base_options(settings).items() if key == "revision"}
    family, index = find_family(settings)
    try:
        configs = {
            component: getattr(diffusers, index[component][1]).load_config(location, subfolder=component, **options)
            for component in (family.denoiser, "vae", "scheduler")
        }
        components = (family.denoiser, *trained_text_encoders(family, index, adapter))
        with init_empty_weights():
            models = {
                component: empty_model(family, component, index, configs, location, options) for component in components
            }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _no_base(name, error) from None
    if lora and not hasattr(getattr(diffusers, family.pipeline_class), "load_lora_weights"):
        raise InputError(f"--save_lora: diffusers' {family.pipeline_class} loads no LoRA.")
    if reason := family.check(configs):
        raise InputError(f"{name!r} cannot be trained: {reason}.")
    side = resolution or family.default_side(configs)
    if side % family.multiple(configs):
        raise InputError(f"--resolution must be a multiple of {family.multiple(configs)} for this base, got {side}.")
    adapters, left_out = {}, []
    for component, model in models.items():
        lost = set(unreachable(model)) | set(family.unreachable(component, model))
        named = attention_targets(model, adapter.targets, reachable=False)
        left_out += [f"{component}.{layer}" for layer in named if layer in lost]
        adapters[component] = adapter.config([layer for layer in named if layer not in lost], seed)
        _check_room(component, model, adapters[component])
        if lora:
            _check_lora(component, model, adapters[component])
    shape = family.latent_shape(configs, side)
    objective = family.objective(configs, shape, loss or LossSettings())
    return BasePlan(settings, location, family, side, shape, objective, adapters, tuple(left_out), index, configs)


def trained_text_encoders(family: type[Family], index: Mapping[str, Any], adapter: AdapterSettings) -> tuple[str, ...]:
    """The text encoders that are trained; raises InputError where they are asked for and the base has none to train."""
    if not adapter.train_text_encoder:
        return ()
    present = tuple(name for name in family.trainable_text_encoders if (index.get(name) or [None])[0] is not None)
    if not present:
        raise InputError(f"--train_text_encoder: the text encoder of {family.pipeline_class} is not to be trained.")
    return present


def empty_model(
    family: type[Family],
    component: str,
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    location: str,
    options: Mapping[str, str],
) -> nn.Module:
    """A component from its config, to be built without weights."""
    if component in configs:
        return getattr(diffusers, index[component][1]).from_config(configs[component])
    kind = getattr(transformers, index[component][1])
    return kind(kind.config_class.from_pretrained(location, subfolder=component, **options))


def _check_room(component: str, model: nn.Module, config: S2FTConfig) -> None:
    for name in sorted(config.target_modules):
        layer = model.get_submodule(name)
        try:
            trained_numbers(delta_shape(layer), config, config.n_frequency)
        except ValueError as error:
            raise InputError(f"{component}.{name}: {error}") from None


def _check_lora(component: str, model: nn.Module, config: S2FTConfig) -> None:
    for name in sorted(config.target_modules):
        layer = model.get_submodule(name)
        if getattr(layer, "groups", 1) > 1:
            raise InputError(
                f"--save_lora: {component}.{name} is a convolution in groups, for which LoRA files have no form; "
                "--targets attention leaves it out."
            )


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the autoencoder of a run in `dtype` computes in."""
    return torch.float32 if dtype == torch.float16 else dtype


def load_base(
    plan: BasePlan,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization | None = None,
    device: torch.device | None = None,
) -> Family:
    """The family with its loaded pipeline: models in host memory and evaluation mode, with no parameter trainable.

    `quantize` packs the frozen linear layers, on the device that the family's models are going to work on. In float16
    the autoencoder is in float32, as diffusers' scripts have it: activations of some overflow.
    """
    pipeline = load_pipeline(
        plan.location,
        plan.family,
        dtype,
        plan.options,
        vae_dtype=vae_dtype(dtype),
        quantize=quantize,
        device=device or torch.device("cpu"),
    )
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False).eval()
    return plan.family(pipeline, max_tokens=plan.settings.max_tokens, guidance=plan.settings.guidance, device=device)
