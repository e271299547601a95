"""diffusers' verbs over adapters, for pipelines that have none because diffusers loads no LoRA into them (PixArt-Σ)."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import set_adapter_layers, set_weights_and_activate_adapters

from .attach import active_kept, active_names, adaptable_components, detach_adapters, s2ft_adapters
from .offloading import offloading_paused


def give_verbs(kind: type[DiffusionPipeline]) -> None:
    """Give a class of pipelines the verbs, unless it has diffusers' own."""
    if not issubclass(kind, LoraBaseMixin):
        for verb in VERBS:
            setattr(kind, verb.__name__, verb)


def set_adapters(
    self: DiffusionPipeline,
    adapter_names: str | Sequence[str],
    adapter_weights: float | Sequence[float | None] | None = None,
) -> None:
    """Make adapters active, each with its weight (1 unless given).

    Raises ValueError for an adapter that is not loaded, and for as many weights as there are not adapters.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    single = adapter_weights is None or isinstance(adapter_weights, int | float)
    weights = [adapter_weights] * len(names) if single else list(adapter_weights)
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights for the adapters {names}.")
    if unknown := sorted(set(names) - set(s2ft_adapters(self))):
        raise ValueError(f"There is no adapter named {unknown[0]!r}; the pipeline has {s2ft_adapters(self)}.")
    weights = [1.0 if weight is None else weight for weight in weights]
    for model in adaptable_components(self).values():
        set_weights_and_activate_adapters(model, names, weights)


def disable_lora(self: DiffusionPipeline) -> None:
    """Switch all adapters off."""
    for model in adaptable_components(self).values():
        set_adapter_layers(model, enabled=False)


def enable_lora(self: DiffusionPipeline) -> None:
    """Switch adapters on again."""
    for model in adaptable_components(self).values():
        set_adapter_layers(model, enabled=True)


def delete_adapters(self: DiffusionPipeline, adapter_names: str | Sequence[str]) -> None:
    """Remove adapters, and layers that are left without one."""
    models = adaptable_components(self).values()
    with offloading_paused(self), active_kept(models):
        for name in [adapter_names] if isinstance(adapter_names, str) else list(adapter_names):
            for model in models:
                detach_adapters(model, name)


def get_active_adapters(self: DiffusionPipeline) -> list[str]:
    """The names of active adapters."""
    return list(dict.fromkeys(name for model in adaptable_components(self).values() for name in active_names(model)))


def get_list_adapters(self: DiffusionPipeline) -> dict[str, list[str]]:
    """The names of loaded adapters, by component."""
    models = adaptable_components(self).items()
    return {component: list(model.peft_config) for component, model in models if hasattr(model, "peft_config")}


VERBS = (set_adapters, disable_lora, enable_lora, delete_adapters, get_active_adapters, get_list_adapters)
