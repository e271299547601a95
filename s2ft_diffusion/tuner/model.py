"""`S2FTModel`: the tuner that puts S2FT layers into a model, entered into PEFT's own registries."""

from __future__ import annotations

import functools
import logging
from typing import Any

import peft.mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from .config import S2FTConfig, S2FTType
from .layer import S2FTLayer, innermost, layer_type

logger = logging.getLogger(__name__)


class S2FTModel(BaseTuner):
    """Puts S2FT layers in place of a model's linear layers and convolutions.

    Made by `get_peft_model` or a model's `add_adapter`. Raises TypeError, naming the module, for a target that is
    neither, and ValueError for an `n_frequency` that a layer has no room for.
    """

    prefix: str = "s2ft_"
    tuner_layer_cls = S2FTLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        s2ft_config: S2FTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        pattern = s2ft_config.n_frequency_pattern
        # A name as it is comes first: another layer's may end like it.
        key = current_key if current_key in pattern else get_pattern_key(pattern.keys(), current_key)
        n_frequency = pattern.get(key, s2ft_config.n_frequency)
        if (layer := _s2ft_layer_in(target)) is not None:
            layer.update_layer(adapter_name, n_frequency, s2ft_config, current_key)
            return
        kind = layer_type(target)
        if kind is None:
            raise TypeError(
                f"S2FT cannot adapt {current_key!r}, a {type(innermost(target)).__name__}: it adapts linear layers and "
                "convolutions. Choose other target_modules, or name this one in exclude_modules."
            )
        module = kind(target, adapter_name, n_frequency, s2ft_config, current_key)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    def _post_injection_hook(self, model: nn.Module, config: S2FTConfig, adapter_name: str) -> None:
        _guard_fuse_qkv_projections(type(model))
        if config.sampling in ("power", "top") and not config.inference_mode:
            logger.info(
                "S2FT adapter %r starts without a prior: identity order, low-frequency positions. "
                "initialize_s2ft_weights estimates one.",
                adapter_name,
            )


def _s2ft_layer_in(module: nn.Module) -> S2FTLayer | None:
    """The S2FT layer that a module is, or that adapters of other kinds have been put around."""
    while isinstance(module, BaseTunerLayer):
        if isinstance(module, S2FTLayer):
            return module
        module = module.base_layer
    return None


def _guard_fuse_qkv_projections(kind: type[nn.Module]) -> None:
    """Fusing q, k and v copies base weights, which would silently drop an unfused adapter: make it say so."""
    original = getattr(kind, "fuse_qkv_projections", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def fuse_qkv_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, module in self.named_modules():
            if isinstance(module, S2FTLayer) and module.s2ft_delta and not module.merged:
                raise ValueError(f"{name} has an unfused S2FT adapter; call fuse_s2ft() before fuse_qkv_projections().")
        return original(self, *args, **kwargs)

    kind.fuse_qkv_projections = fuse_qkv_projections


def register() -> None:
    """Enter S2FT into PEFT's public mappings."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[S2FTType.S2FT] = S2FTConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[S2FTType.S2FT] = S2FTModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[S2FTType.S2FT] = S2FTModel.prefix


register()
