"""diffusers' own verbs beside S2FT: they walk over every PEFT layer as if it were a LoRA's.

`set_adapters`, `enable_lora`, `disable_lora`, `get_active_adapters` and `get_list_adapters` mean adapters of any kind.
Those guarded here take what is their own, and the adapter loaded last, of whatever kind, is the active one. A pipeline
without S2FT layers runs diffusers' code alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders import lora_pipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models import controlnets
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters.names import module_name
from ..tuner.layer import S2FTLayer
from .attach import (
    activate,
    adaptable_components,
    drop_empty_layers,
    left_alone,
    s2ft_adapters,
    s2ft_configs,
    s2ft_layers,
)
from .offloading import offloading_paused

Method = Callable[..., Any]


def install_guards() -> None:
    """Wrap diffusers' methods; called once, when the package is imported."""
    for owner, name, guard in (
        (LoraBaseMixin, "unload_lora_weights", _unload_lora),
        (LoraBaseMixin, "fuse_lora", _fuse_lora),
        (LoraBaseMixin, "unfuse_lora", _unfuse_lora),
        (LoraBaseMixin, "delete_adapters", _delete_adapters),
        (LoraBaseMixin, "set_lora_device", _set_lora_device),
        (PeftAdapterMixin, "fuse_lora", _on_a_model),
        (PeftAdapterMixin, "unfuse_lora", _on_a_model),
        (PeftAdapterMixin, "delete_adapters", _delete_from_model),
        (DiffusionPipeline, "save_pretrained", _save_pretrained),
    ):
        setattr(owner, name, guard(getattr(owner, name)))
    for loader in vars(lora_pipeline).values():
        if isinstance(loader, type) and issubclass(loader, LoraBaseMixin) and "load_lora_weights" in vars(loader):
            loader.load_lora_weights = _load_lora(loader.load_lora_weights)
    copying = [*vars(controlnets).values(), diffusers.UNetMotionModel]
    for kind in dict.fromkeys(kind for kind in copying if isinstance(kind, type)):
        for name in ("from_unet", "from_unet2d", "from_transformer"):
            if name in vars(kind):
                setattr(kind, name, classmethod(_copies(vars(kind)[name].__func__)))


# Each takes its own --------------------------------------------------------------------------------------------------


def _fuse_lora(original: Method) -> Method:
    @functools.wraps(original)
    def fuse_lora(self: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        own = s2ft_adapters(self)
        if found := sorted(set(own) & set(adapter_names or [])):
            raise ValueError(f"{found[0]!r} is an S2FT adapter; fuse it with fuse_s2ft.")
        with left_alone(s2ft_layers(self)):
            result = original(self, *args, adapter_names=adapter_names, **kwargs)
        self._merged_adapters = self._merged_adapters - set(own)
        return result

    return fuse_lora


def _unfuse_lora(original: Method) -> Method:
    @functools.wraps(original)
    def unfuse_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        with left_alone(s2ft_layers(self)):
            return original(self, *args, **kwargs)

    return unfuse_lora


def _on_a_model(original: Method) -> Method:
    @functools.wraps(original)
    def fuse_or_unfuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        with left_alone(module for module in self.modules() if isinstance(module, S2FTLayer)):
            return original(self, *args, **kwargs)

    return fuse_or_unfuse


def _set_lora_device(original: Method) -> Method:
    """S2FT adapters move as well; diffusers looks for LoRA's matrices on every layer."""

    @functools.wraps(original)
    def set_lora_device(self: Any, adapter_names: list[str], device: torch.device | str | int) -> None:
        layers = s2ft_layers(self)
        for layer in layers:
            vars(layer)["lora_A"] = {}
        try:
            original(self, adapter_names, device)
        finally:
            for layer in layers:
                del vars(layer)["lora_A"]
        for layer in layers:
            for name in set(adapter_names) & set(layer.s2ft_delta):
                layer.s2ft_delta[name].to(device)

    return set_lora_device


def _unload_lora(original: Method) -> Method:
    """Unloading LoRAs strips every PEFT layer; S2FT layers are put back, the very same, with all their state."""

    @functools.wraps(original)
    def unload_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = [(model, _chains(model), s2ft_configs(model)) for model in adaptable_components(self).values()]
        result = original(self, *args, **kwargs)
        for model, chains, configs in kept:
            for name, layers in chains.items():
                module = model.get_submodule(name)
                for layer in layers:
                    layer.base_layer = module
                    module = layer
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
            if chains:
                model.peft_config = configs
                model._hf_peft_config_loaded = True
        return result

    return unload_lora_weights


def _chains(model: nn.Module) -> dict[str, list[S2FTLayer]]:
    """The S2FT layers around each linear layer, the innermost first, by the linear layer's name."""
    chains: dict[str, list[S2FTLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, S2FTLayer) and module.s2ft_delta:
            chains.setdefault(module_name(name), []).insert(0, module)
    return chains


# What is active ------------------------------------------------------------------------------------------------------


def _load_lora(original: Method) -> Method:
    @functools.wraps(original)
    def load_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _names(self)
        result = original(self, *args, **kwargs)
        if s2ft_layers(self) and (new := [name for name in _names(self) if name not in before]):
            activate(adaptable_components(self), new[-1])
        return result

    return load_lora_weights


def _names(pipeline: DiffusionPipeline) -> list[str]:
    models = adaptable_components(pipeline).values()
    return [name for model in models for name in getattr(model, "peft_config", {})]


def set_active(pipeline: DiffusionPipeline, names: list[str]) -> None:
    """The active adapters on every layer, of whatever kind; what is switched off stays off."""
    for model in adaptable_components(pipeline).values():
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names, inference_mode=True)


# What stays behind ---------------------------------------------------------------------------------------------------


def _delete_adapters(original: Method) -> Method:
    """With its last adapter a layer goes, too: the model is the base again, to be saved or copied.

    Where no active adapter is left, PEFT makes each layer's first one active: here it is one for all layers.
    """

    @functools.wraps(original)
    def delete_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not s2ft_layers(self):
            return original(self, *args, **kwargs)
        active = self.get_active_adapters()
        with offloading_paused(self):
            result = original(self, *args, **kwargs)
            for model in adaptable_components(self).values():
                drop_empty_layers(model)
            left = sorted(_names(self))
            set_active(self, [name for name in active if name in left] or left[:1])
        return result

    return delete_adapters


def _delete_from_model(original: Method) -> Method:
    @functools.wraps(original)
    def delete_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if drop_empty_layers(self):
            _maybe_remove_and_reapply_group_offloading(self)
        return result

    return delete_adapters


def _save_pretrained(original: Method) -> Method:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if names := s2ft_adapters(self):
            raise ValueError(
                f"The pipeline has S2FT adapters ({', '.join(names)}), which would be mixed into the base's weights. "
                "Save them with save_s2ft_weights. For the base alone call unload_s2ft_weights() first; for both in "
                "one, fuse_s2ft() and then unload_s2ft_weights()."
            )
        return original(self, *args, **kwargs)

    return save_pretrained


def _copies(original: Method) -> Method:
    """`ControlNetModel.from_unet` and its like copy weights by their names, which adapters change."""

    @functools.wraps(original)
    def from_model(cls: type, *args: Any, **kwargs: Any) -> Any:
        for model in (*args, *kwargs.values()):
            if isinstance(model, nn.Module) and any(isinstance(m, S2FTLayer) for m in model.modules()):
                raise ValueError(
                    f"{cls.__name__}.{original.__name__} copies the weights of a model that has S2FT adapters: call "
                    "unload_s2ft_weights() first (after fuse_s2ft() to keep their change), and load them again after."
                )
        return original(cls, *args, **kwargs)

    return from_model


def guard_encode_prompt(kind: type[DiffusionPipeline]) -> None:
    """diffusers scales a text encoder's adapters, encodes, and scales back; not so if encoding fails. Here it does."""
    owner = next((owner for owner in kind.__mro__ if "encode_prompt" in vars(owner)), None)
    if owner is None or hasattr(owner.encode_prompt, "_s2ft_guard"):
        return
    original = owner.encode_prompt

    @functools.wraps(original)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(layer, {n: list(s) for n, s in layer.s2ft_passing_scales.items()}) for layer in s2ft_layers(self)]
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            for layer, scales in before:
                layer.s2ft_passing_scales = scales
            raise

    encode_prompt._s2ft_guard = True
    owner.encode_prompt = encode_prompt
