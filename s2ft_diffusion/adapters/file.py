"""The adapter file: one safetensors file that holds everything needed to rebuild a weight change elsewhere.

Every adapted layer has its tensors under `<component>.<module name>.` (component: `unet`, `transformer`,
`text_encoder`, `text_encoder_2`); `format` says which, and in which bits. The header's metadata has one entry,
`s2ft`: a JSON object with `format_version`, the `dtype` of the coefficients, the config of each component, each layer's
shape, and `info`. (One, because safetensors writes several in random order, and equal adapters shall make equal files.)

`reading` reads it, strictly; this adds PEFT's config, what is in models, and writing.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from ..tuner.config import S2FTConfig
from ..tuner.layer import S2FTConv, S2FTLayer
from ..tuner.prior import s2ft_layers
from .format import DTYPES, FORMAT_VERSION, encode_layer, stored_coefficients
from .names import canonical_name
from .reading import (
    COMPONENTS,
    CONFIG_FIELDS,
    METADATA_KEY,
    WEIGHTS_NAME,
    Adapter,
    AdapterHeader,
    AdapterInfo,
    read_header,
    read_stored,
)
from .tool_names import component_of
from .weights import AdapterFileError, FreeWeights, GridWeights, LayerWeights, weights_from_state

__all__ = [
    "COMPONENTS",
    "DTYPES",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterFileError",
    "AdapterHeader",
    "AdapterInfo",
    "FreeWeights",
    "GridWeights",
    "LayerWeights",
    "WrittenAdapter",
    "adapter_from_peft",
    "collect_adapter",
    "make_thumbnail",
    "read_adapter",
    "read_header",
    "write_adapter",
]

THUMBNAIL_BYTES = 20 * 1024
THUMBNAIL_SIDE = 128


def make_thumbnail(image: Image.Image) -> bytes:
    """A WebP of at most `THUMBNAIL_SIDE` pixels a side and `THUMBNAIL_BYTES` bytes."""
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    for quality in (80, 60, 40, 20, 5):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


def collect_adapter(components: Mapping[str, nn.Module], adapter_name: str, info: AdapterInfo | None = None) -> Adapter:
    """Read an adapter out of the models of a pipeline, by component name.

    Raises ValueError if no component has it, and for one with `modules_to_save`, which the file has no place for.
    """
    configs, layers, kernels = {}, {}, {}
    for component, model in components.items():
        found = s2ft_layers(model, adapter_name)
        if found:
            configs[component] = next(iter(found.values())).s2ft_config[adapter_name]
            if whole := configs[component].modules_to_save:
                raise ValueError(
                    f"{adapter_name!r} trains {sorted(whole)} whole (modules_to_save), which an S2FT file cannot hold; "
                    "use PEFT's save_pretrained, or get_peft_model_state_dict."
                )
            layers[component] = {
                canonical_name(component, name): _collect_layer(layer, adapter_name) for name, layer in found.items()
            }
            kernels[component] = {
                canonical_name(component, name): tuple(layer.get_base_layer().kernel_size)
                for name, layer in found.items()
                if isinstance(layer, S2FTConv)
            }
    if not layers:
        raise ValueError(f"No component has an S2FT adapter named {adapter_name!r}.")
    return Adapter(configs, layers, info or AdapterInfo(), kernels)


def _collect_layer(layer: S2FTLayer, adapter_name: str) -> LayerWeights:
    state = {name: tensor.detach().cpu() for name, tensor in layer.s2ft_delta[adapter_name].state_dict().items()}
    return weights_from_state(state, layer.s2ft_config[adapter_name].norm, check=False)


# Writing -------------------------------------------------------------------------------------------------------------


class WrittenAdapter(NamedTuple):
    """A file's size in bytes, and the error that storing the coefficients has made, relative to the weight change."""

    bytes: int
    relative_error: float


def write_adapter(path: str | os.PathLike, adapter: Adapter, dtype: str = "float32") -> WrittenAdapter:
    """Write an adapter file, beside its place first and then renamed.

    `dtype` is that of the coefficients: "float32", "float16", "bfloat16" or "int8" (with one scale a layer). Raises
    ValueError for another one, or for coefficients that are not finite in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    tensors: dict[str, torch.Tensor] = {}
    error = change = 0.0
    for component, layers in adapter.layers.items():
        config = adapter.configs[component]
        for name, layer in layers.items():
            try:
                encoded = encode_layer(layer, dtype)
            except ValueError as problem:
                raise ValueError(f"{component}.{name} has {problem}.") from None
            tensors |= {f"{component}.{name}.{key}": tensor for key, tensor in encoded.items()}
            exact = layer.coefficients.float()
            error += (config.scaling * layer.change_norm(stored_coefficients(layer, dtype) - exact)) ** 2
            change += (config.scaling * layer.change_norm(exact)) ** 2
    configs = {c: {name: getattr(config, name) for name in CONFIG_FIELDS} for c, config in adapter.configs.items()}
    shapes = {c: {name: list(layer.shape) for name, layer in layers.items()} for c, layers in adapter.layers.items()}
    info = adapter.info.to_json()
    info.setdefault("date", datetime.now(UTC).isoformat(timespec="seconds"))
    header = {
        "format_version": FORMAT_VERSION, "dtype": dtype, "config": configs, "shapes": shapes, "info": info,
        "kernels": adapter.kernels,
    }  # fmt: skip
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata=metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return WrittenAdapter(path.stat().st_size, math.sqrt(error / change) if change else 0.0)


# Reading -------------------------------------------------------------------------------------------------------------


def read_adapter(path: str | os.PathLike) -> Adapter:
    """Read and check an adapter file, with an `S2FTConfig` (frozen) for each component.

    Raises AdapterFileError for a file that is not there, damaged, not an adapter, of a newer format, or whose tensors
    and header contradict each other.
    """
    return read_stored(path, functools.partial(S2FTConfig, inference_mode=True))


# PEFT's own state dicts ----------------------------------------------------------------------------------------------


def adapter_from_peft(
    state_dict: Mapping[str, torch.Tensor], config: S2FTConfig, component: str | None, source: str = "state dict"
) -> Adapter:
    """An adapter from PEFT's keys (`get_peft_model_state_dict`, `save_pretrained`), checked like a file.

    Keys may start with a component's name ("unet."); those that don't belong to `component`, by default to the one
    that has layers of such names.
    """
    parts: dict[tuple[str | None, str], dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        path, marker, tensor_name = key.removeprefix("base_model.model.").rpartition(".s2ft_delta.")
        if not marker:
            raise AdapterFileError(f"{source}: {key!r} is no key of an S2FT adapter.")
        first, _, rest = path.partition(".")
        place = (first, rest) if first in COMPONENTS else (component, path)
        parts.setdefault(place, {})[tensor_name] = tensor.detach().cpu().clone()  # the adapter's own
    if not parts:
        raise AdapterFileError(f"{source}: there are no S2FT weights in it.")
    layers: dict[str, dict[str, LayerWeights]] = {}
    usual = component_of(name for _, name in parts)
    for (owner, name), tensors in parts.items():
        owner = owner or usual
        try:
            layer = weights_from_state(tensors, config.norm)
        except AdapterFileError as error:
            raise AdapterFileError(f"{source}: {owner}.{name}: {error}") from None
        if isinstance(layer, FreeWeights):
            if layer.kind != config.coefficients:
                found = tuple(layer.coefficients.shape)
                raise AdapterFileError(
                    f"{source}: {owner}.{name}: coefficients have shape {found} and should be {config.coefficients}."
                )
            config = replace(config, positions="free", oversampling=1)  # which a config made in code may not say
        elif config.positions != "grid":
            raise AdapterFileError(f"{source}: {owner}.{name}: it is on a grid, its config says free positions.")
        name = canonical_name(owner, name)
        if name in layers.setdefault(owner, {}):
            raise AdapterFileError(f"{source}: {owner}.{name} is there under two names.")
        layers[owner][name] = layer
    return Adapter(dict.fromkeys(layers, config), layers)
