"""diffusers' own verbs beside S2FT: they walk over every PEFT layer as if it were a LoRA's.

`set_adapters`, `enable_lora`, `disable_lora`, `get_active_adapters` and `get_list_adapters` mean adapters of any kind.
Those guarded here take what is their own, of a pipeline and of one model; the adapter loaded last, of whatever kind, is
the active one, and what is left of several is active when that goes. A pipeline without S2FT layers runs diffusers'
code alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import torch
import transformers.integrations.peft
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders import lora_base, lora_pipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models import controlnets
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..tuner.layer import S2FTLayer
from .attach import (
    activate,
    active_kept,
    active_names,
    adaptable_components,
    drop_empty_layers,
    left_alone,
    s2ft_adapters,
    s2ft_configs,
    s2ft_layers,
    set_aside,
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
        (LoraBaseMixin, "get_active_adapters", _get_active_adapters),
        (lora_base, "_remove_text_encoder_monkey_patch", _unload_from_model),
        (PeftAdapterMixin, "unload_lora", _unload_from_model),
        (PeftAdapterMixin, "load_lora_adapter", _load_lora_into_model),
        (transformers.integrations.peft.PeftAdapterMixin, "load_adapter", _load_into_model),
        (PeftAdapterMixin, "fuse_lora", _on_a_model),
        (PeftAdapterMixin, "unfuse_lora", _on_a_model),
        (PeftAdapterMixin, "delete_adapters", _delete_from_model),
        (LoraBaseMixin, "write_lora_layers", _write_lora_layers),
        (PeftAdapterMixin, "save_lora_adapter", _save_lora_adapter),
        (DiffusionPipeline, "save_pretrained", _save_pretrained),
        (ModelMixin, "save_pretrained", _save_model),
        (PreTrainedModel, "save_pretrained", _save_model),
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
    # Pipelines of several classes can share a text encoder, and any model can be adapted without a pipeline.
    _guard_all(DiffusionPipeline, "encode_prompt", _encode_prompt)
    _guard_all(ModelMixin, "fuse_qkv_projections", _fuse_qkv)


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
    @functools.wraps(original)
    def unload_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        with active_kept(adaptable_components(self).values()):
            return original(self, *args, **kwargs)

    return unload_lora_weights


def _unload_from_model(original: Method) -> Method:
    """Unloading LoRAs strips every PEFT layer; S2FT layers are put back, the very same, with all their state."""

    @functools.wraps(original)
    def unload_lora(model: nn.Module) -> None:
        configs = s2ft_configs(model)
        with active_kept([model]):
            with set_aside([model]):
                original(model)
            if configs:
                model.peft_config = configs
                model._hf_peft_config_loaded = True

    return unload_lora


# What is active ------------------------------------------------------------------------------------------------------


def _load_lora(original: Method) -> Method:
    @functools.wraps(original)
    def load_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = adaptable_components(self)
        before = _names(models.values())
        with set_aside(models.values()):
            result = original(self, *args, **kwargs)
        if s2ft_layers(self) and (new := [name for name in _names(models.values()) if name not in before]):
            activate(models.values(), new[-1])
        return result

    return load_lora_weights


def _load_into_model(original: Method) -> Method:
    """PEFT makes what it adds active on layers of its own kind alone."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _names([self])
        result = original(self, *args, **kwargs)
        mixed = any(isinstance(module, S2FTLayer) for module in self.modules())
        if mixed and (new := [name for name in _names([self]) if name not in before]):
            activate([self], new[-1])
        return result

    return load_adapter


def _load_lora_into_model(original: Method) -> Method:
    @functools.wraps(original)
    def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with set_aside([self]):
            return original(self, *args, **kwargs)

    return _load_into_model(load_lora_adapter)


def _names(models: Iterable[nn.Module]) -> list[str]:
    return [name for model in models for name in getattr(model, "peft_config", {})]


def _get_active_adapters(original: Method) -> Method:
    """diffusers asks one layer of the last model; models may differ, and a layer names what other models have."""

    @functools.wraps(original)
    def get_active_adapters(self: Any) -> list[str]:
        if not s2ft_layers(self):
            return original(self)
        models = adaptable_components(self).values()
        found = [name for model in models for name in active_names(model) if name in getattr(model, "peft_config", {})]
        return list(dict.fromkeys(found))

    return get_active_adapters


# What stays behind ---------------------------------------------------------------------------------------------------


def _delete_adapters(original: Method) -> Method:
    """With its last adapter a layer goes, too: the model is the base again, to be saved or copied."""

    @functools.wraps(original)
    def delete_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not s2ft_layers(self):
            return original(self, *args, **kwargs)
        models = adaptable_components(self).values()
        with offloading_paused(self), active_kept(models):
            result = original(self, *args, **kwargs)
            for model in models:
                drop_empty_layers(model)
        return result

    return delete_adapters


def _delete_from_model(original: Method) -> Method:
    @functools.wraps(original)
    def delete_adapters(self: Any, *args: Any, **kwargs: Any) -> Any:
        with active_kept([self]):
            result = original(self, *args, **kwargs)
            if drop_empty_layers(self):
                _maybe_remove_and_reapply_group_offloading(self)
        return result

    return delete_adapters


def _save_pretrained(original: Method) -> Method:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        _base_alone("pipeline", s2ft_adapters(self), adaptable_components(self).values())
        return original(self, *args, **kwargs)

    return save_pretrained


def _save_model(original: Method) -> Method:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers writes a model's adapters, in PEFT's format, where diffusers mixes them into the base.
        names = [] if isinstance(self, PreTrainedModel) else list(s2ft_configs(self))
        _base_alone("model", names, [self])
        return original(self, *args, **kwargs)

    return save_pretrained


def _base_alone(owner: str, names: list[str], models: Iterable[nn.Module]) -> None:
    """Refuse what would be saved as a base that cannot be read again: PEFT's layers change the names of its weights.

    diffusers leaves LoRA's layers behind when it deletes the last LoRA; those without adapters make way here.
    """
    if names:
        raise ValueError(
            f"The {owner} has S2FT adapters ({', '.join(names)}), which would be mixed into the base's weights. "
            "Save them with save_s2ft_weights. For the base alone call unload_s2ft_weights() first; for both in "
            "one, fuse_s2ft() and then unload_s2ft_weights()."
        )
    for model in models:
        drop_empty_layers(model, of=BaseTunerLayer)


def _save_lora_adapter(original: Method) -> Method:
    @functools.wraps(original)
    def save_lora_adapter(
        self: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if adapter_name in s2ft_configs(self):
            raise ValueError(
                f"{adapter_name!r} is an S2FT adapter; save it with save_s2ft_weights, or save_s2ft_as_lora."
            )
        return original(self, save_directory, adapter_name, *args, **kwargs)

    return save_lora_adapter


def _write_lora_layers(original: Method) -> Method:
    @functools.wraps(original)
    def write_lora_layers(state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if any(".s2ft_delta." in name for name in state_dict):
            raise ValueError(
                "These are an S2FT adapter's tensors; save it with save_s2ft_weights, or save_s2ft_as_lora."
            )
        return original(state_dict, *args, **kwargs)

    return staticmethod(write_lora_layers)


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


def _fuse_qkv(original: Method) -> Method:
    """Fusing q, k and v copies base weights, which would silently drop an unfused adapter."""

    @functools.wraps(original)
    def fuse_qkv_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, module in self.named_modules():
            if isinstance(module, S2FTLayer) and module.s2ft_delta and not module.merged:
                raise ValueError(f"{name} has an unfused S2FT adapter; call fuse_s2ft() before fuse_qkv_projections().")
        return original(self, *args, **kwargs)

    return fuse_qkv_projections


def _encode_prompt(original: Method) -> Method:
    """diffusers scales a text encoder's adapters, encodes, and scales back; not so if encoding fails. Here it does."""

    @functools.wraps(original)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(layer, {n: list(s) for n, s in layer.s2ft_passing_scales.items()}) for layer in s2ft_layers(self)]
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            for layer, scales in before:
                layer.s2ft_passing_scales = scales
            raise

    return encode_prompt


def _guard_all(base: type, name: str, guard: Callable[[Method], Method]) -> None:
    """Wrap a method of every subclass of `base`, those that diffusers imports later too, where each one has it from."""

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        wrap(cls)

    def wrap(kind: type) -> None:
        for owner in kind.__mro__:
            original = vars(owner).get(name)
            if inspect.isfunction(original) and not hasattr(original, "_s2ft_guard"):
                guarded = guard(original)
                guarded._s2ft_guard = True
                setattr(owner, name, guarded)

    base.__init_subclass__ = classmethod(__init_subclass__)
    kinds = [base]
    for kind in kinds:
        kinds += kind.__subclasses__()
        wrap(kind)
