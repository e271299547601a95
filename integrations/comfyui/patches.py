"""S2FT layers as patches of ComfyUI's own patcher, and which weight of a model each of them belongs to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import comfy.lora
import torch

from s2ft_diffusion.adapters.reading import Adapter
from s2ft_diffusion.adapters.tool_names import key
from s2ft_diffusion.adapters.weights import LayerWeights

try:
    from comfy.weight_adapter import WeightAdapterBase
except ImportError:
    raise ImportError("Load S2FT: this ComfyUI is too old; it needs 0.3.28 or newer.") from None

DENOISERS = ("unet", "transformer")


class S2FTPatch(WeightAdapterBase):
    """One layer's change: what is kept is what the file has; the product is made when ComfyUI asks for the weight."""

    name = "s2ft"

    def __init__(self, loaded_keys: set[str], weights: tuple[LayerWeights, float]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """The weight (out, in, ...) with the change times `strength` added, in place."""
        layer, scaling = self.weights
        change = on_device(layer, weight.device).delta().mul_(strength * scaling)
        weight += function(change.reshape(weight.shape).to(weight.dtype))
        return weight


def on_device(layer: LayerWeights, device: torch.device) -> LayerWeights:
    """A layer whose tensors lie on a device."""
    tensors = {f.name: getattr(layer, f.name) for f in fields(layer)}
    return replace(layer, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, torch.Tensor)})


def model_patches(adapter: Adapter, model: Any) -> dict[Any, S2FTPatch]:
    """Patches of a diffusion model by ComfyUI's keys. Raises ValueError for a model that the adapter is not for."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    return _patches(adapter, DENOISERS, names, model.model.state_dict())


def clip_patches(adapter: Adapter, clip: Any) -> dict[Any, S2FTPatch]:
    """Patches of text encoders by ComfyUI's keys. Raises ValueError for encoders that the adapter is not for."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    encoders = tuple(component for component in adapter.layers if component not in DENOISERS)
    return _patches(adapter, encoders, names, clip.cond_stage_model.state_dict())


def _patches(
    adapter: Adapter, components: tuple[str, ...], names: dict[str, Any], weights: dict[str, torch.Tensor]
) -> dict[Any, S2FTPatch]:
    patches: dict[Any, S2FTPatch] = {}
    trained_on = adapter.info.base_model or "another model"
    for component in components:
        for name, layer in adapter.layers.get(component, {}).items():
            target = names.get(key("comfyui", component, name))
            if target is None:
                raise ValueError(
                    f"Load S2FT: this adapter was trained on {trained_on}; this model has no layer {component}.{name}."
                )
            shape = _shape(target, weights)
            if shape != layer.shape:
                raise ValueError(
                    f"Load S2FT: this adapter was trained on {trained_on}, where {component}.{name} is "
                    f"{layer.shape[0]}x{layer.shape[1]}; in this model it is {shape[0]}x{shape[1]}."
                )
            patches[target] = S2FTPatch(set(), (layer, adapter.configs[component].scaling))
    return patches


def _shape(target: Any, weights: dict[str, torch.Tensor]) -> tuple[int, int]:
    """The shape, as a matrix, of a weight or of the slice of one that ComfyUI means by a key."""
    if isinstance(target, str):
        weight = weights[target]
        return weight.shape[0], weight[0].numel()
    weight = weights[target[0]]
    if target[1] is not None:
        weight = weight.narrow(*target[1])
    return weight.shape[0], weight[0].numel()
