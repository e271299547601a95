"""The adapter file: one safetensors file that holds everything needed to rebuild a weight change elsewhere.

Every adapted layer has its tensors under `<component>.<module name>.` (component: `unet`, `transformer`,
`text_encoder`, `text_encoder_2`); `format` says which, and in which bits. The header's metadata has one entry,
`s2ft`: a JSON object with `format_version`, the `dtype` of the coefficients, the config of each component, each layer's
shape, and `info`. (One, because safetensors writes several in random order, and equal adapters shall make equal files.)

Reading is strict: whatever the tensors hold is checked before anyone uses it, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..tuner.config import S2FTConfig
from ..tuner.layer import S2FTLayer
from ..tuner.prior import s2ft_layers
from ..tuner.spectrum import delta_norm
from .format import (
    DTYPES,
    FORMAT_VERSION,
    TENSOR_NAMES,
    AdapterFileError,
    LayerWeights,
    check_layer,
    decode_layer,
    encode_layer,
    stored_coefficients,
    tensor_names,
)

WEIGHTS_NAME = "pytorch_s2ft_weights.safetensors"
METADATA_KEY = "s2ft"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
THUMBNAIL_BYTES = 20 * 1024
THUMBNAIL_SIDE = 128
# Config fields that describe the adapter itself; target modules are the file's own keys.
CONFIG_FIELDS = (
    "n_frequency", "n_frequency_pattern", "scaling", "coefficients", "norm", "sampling", "gamma", "rearrange",
    "distance", "signs", "refine", "seed",
)  # fmt: skip


@dataclass
class AdapterInfo:
    """What a file says about itself beside the numbers; every field may be unknown.

    `training` holds plain facts (steps, learning rate, loss, ...). `thumbnail` is a WebP image of at most 20 KiB.
    """

    base_model: str | None = None
    instance_prompt: str | None = None
    subject: str | None = None
    class_name: str | None = None
    date: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["thumbnail"] = base64.b64encode(self.thumbnail).decode() if self.thumbnail else None
        return {name: value for name, value in values.items() if value not in (None, {})}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterInfo:
        """Raises ValueError or TypeError for values of the wrong kind."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name, value in known.items():
            if not isinstance(value, dict if name == "training" else str):
                raise TypeError(f"info.{name} is a {type(value).__name__}")
            if isinstance(value, str):
                value.encode()  # half a surrogate pair, which JSON can hold, is no text
        if "thumbnail" in known:
            known["thumbnail"] = base64.b64decode(known["thumbnail"], validate=True)
        return cls(**known)


@dataclass
class Adapter:
    """An adapter apart from any model: configs and layers by component, and what is known about it."""

    configs: dict[str, S2FTConfig]
    layers: dict[str, dict[str, LayerWeights]]
    info: AdapterInfo = field(default_factory=AdapterInfo)

    @property
    def trainable(self) -> int:
        """Real trainable numbers in all."""
        return sum(layer.coefficients.numel() for layers in self.layers.values() for layer in layers.values())


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
    configs, layers = {}, {}
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
                module_name(name): _collect_layer(layer, adapter_name) for name, layer in found.items()
            }
    if not layers:
        raise ValueError(f"No component has an S2FT adapter named {adapter_name!r}.")
    return Adapter(configs, layers, info or AdapterInfo())


def _collect_layer(layer: S2FTLayer, adapter_name: str) -> LayerWeights:
    delta = layer.s2ft_delta[adapter_name]
    return LayerWeights(delta.shape, **{name: getattr(delta, name).detach().cpu() for name in TENSOR_NAMES})


def module_name(name: str) -> str:
    """A layer's name in the base model: without the `base_layer` steps of other adapters around it."""
    return name.replace(".base_layer", "")


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
            exact, place = layer.coefficients.float(), (layer.positions, layer.shape, config.norm)
            difference = stored_coefficients(layer, dtype) - exact
            error += (config.scaling * delta_norm(difference, *place)) ** 2
            change += (config.scaling * delta_norm(exact, *place)) ** 2
    configs = {c: {name: getattr(config, name) for name in CONFIG_FIELDS} for c, config in adapter.configs.items()}
    shapes = {c: {name: list(layer.shape) for name, layer in layers.items()} for c, layers in adapter.layers.items()}
    info = adapter.info.to_json()
    info.setdefault("date", datetime.now(UTC).isoformat(timespec="seconds"))
    header = {"format_version": FORMAT_VERSION, "dtype": dtype, "config": configs, "shapes": shapes, "info": info}
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


@dataclass(frozen=True)
class AdapterHeader:
    """What a file's header says: its info, configs and layer shapes by component, and its real trainable numbers."""

    info: AdapterInfo
    configs: dict[str, dict[str, Any]]
    shapes: dict[str, dict[str, tuple[int, int]]]
    trainable: int


def read_header(path: str | os.PathLike) -> AdapterHeader:
    """Read a file's header alone: no tensor is read.

    Raises AdapterFileError as `read_adapter` does, for what can be seen there.
    """
    with _open(path) as file:
        header = _header(path, file.metadata())
        sizes = [file.get_slice(key).get_shape() for key in file.keys() if key.endswith(".coefficients")]  # noqa: SIM118
        shapes = {c: {name: tuple(shape) for name, shape in layers.items()} for c, layers in header["shapes"].items()}
        if len(sizes) != (count := sum(map(len, shapes.values()))):
            raise AdapterFileError(f"{path}: it has coefficients of {len(sizes)} layers, its header speaks of {count}.")
        return AdapterHeader(_info(path, header), header["config"], shapes, sum(map(math.prod, sizes)))


def read_adapter(path: str | os.PathLike) -> Adapter:
    """Read and check an adapter file.

    Raises AdapterFileError, naming file and key, for anything that is not exactly as the format says: no or a truncated
    safetensors file, another format or version, missing or extra keys, positions out of range or repeated (a mirror is
    a repeat for complex coefficients), an order that is no permutation, NaN or infinite coefficients. Coefficients keep
    the file's type where it is a floating one.
    """
    with _open(path) as file:
        header = _header(path, file.metadata())
        info = _info(path, header)
        keys = set(file.keys())
        names = tensor_names(header["format_version"], header.get("dtype"))
        expected = {
            f"{component}.{name}.{key}"
            for component, layers in header["shapes"].items()
            for name in layers
            for key in names
        }
        if missing := sorted(expected - keys):
            raise AdapterFileError(f"{path}: {len(missing)} keys are missing, the first is {missing[0]!r}.")
        if extra := sorted(keys - expected):
            raise AdapterFileError(f"{path}: {len(extra)} keys do not belong there, the first is {extra[0]!r}.")
        configs, layers = {}, {}
        for component, shapes in header["shapes"].items():
            configs[component] = _config(path, component, header["config"][component])
            layers[component] = {}
            for name, shape in shapes.items():
                name = sys.intern(name)  # a hundred adapters of a base have the same ones
                prefix = f"{component}.{name}"
                try:
                    # Copies: a tensor that is a view of the mapped file would keep all of it in memory.
                    tensors = {key: file.get_tensor(f"{prefix}.{key}").clone() for key in names}
                    kind = configs[component].coefficients
                    layer = decode_layer(tensors, tuple(shape), kind, header["format_version"])
                except (AdapterFileError, SafetensorError, TypeError, ValueError) as error:
                    raise AdapterFileError(f"{path}: {prefix}: {error}") from None
                layers[component][name] = layer
    return Adapter(configs, layers, info)


def _open(path: str | os.PathLike) -> safe_open:
    if not Path(path).is_file():
        raise AdapterFileError(f"{path}: there is no such file.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path}: not a complete safetensors file ({error}).") from None


def _header(path: str | os.PathLike, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise AdapterFileError(f"{path}: not an S2FT adapter: its header has no {METADATA_KEY!r} entry.")
    try:
        header = json.loads(metadata[METADATA_KEY])
        if header.get("format_version") not in range(1, FORMAT_VERSION + 1):
            raise AdapterFileError(
                f"{path}: format version {header.get('format_version')!r}; this release reads up to {FORMAT_VERSION}."
            )
        if set(header["config"]) != set(header["shapes"]) or not header["shapes"]:
            raise ValueError("config and shapes name different components")
        for component, shapes in header["shapes"].items():
            if component not in COMPONENTS:
                raise ValueError(f"unknown component {component!r}")
            if not isinstance(header["config"][component], dict):
                raise ValueError(f"the config of {component} is no object")
            if not shapes:
                raise ValueError(f"{component} has no layers")
            for name, shape in shapes.items():
                if len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
                    raise ValueError(f"{component}.{name} has shape {shape}")
    except AdapterFileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{path}: the header is damaged ({error}).") from None
    return header


def _info(path: str | os.PathLike, header: Mapping[str, Any]) -> AdapterInfo:
    try:
        return AdapterInfo.from_json(header.get("info", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path}: the header is damaged ({error}).") from None


def _config(path: str | os.PathLike, component: str, values: Mapping[str, Any]) -> S2FTConfig:
    try:
        if different := set(values) ^ set(CONFIG_FIELDS):
            raise ValueError(f"unknown or missing fields {sorted(different)}")
        return S2FTConfig(**values, inference_mode=True)
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path}: the config of {component} is damaged ({error}).") from None


# PEFT's own state dicts ----------------------------------------------------------------------------------------------


def adapter_from_peft(
    state_dict: Mapping[str, torch.Tensor], config: S2FTConfig, component: str, source: str = "state dict"
) -> Adapter:
    """An adapter from PEFT's keys (`get_peft_model_state_dict`, `save_pretrained`), checked like a file.

    Keys may start with a component's name ("unet."); those that don't belong to `component`.
    """
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        path, marker, tensor_name = key.removeprefix("base_model.model.").rpartition(".s2ft_delta.")
        if not marker or tensor_name not in TENSOR_NAMES:
            raise AdapterFileError(f"{source}: {key!r} is no key of an S2FT adapter.")
        first, _, rest = path.partition(".")
        place = (first, rest) if first in COMPONENTS else (component, path)
        parts.setdefault(place, {})[tensor_name] = tensor.detach().cpu().clone()  # the adapter's own
    if not parts:
        raise AdapterFileError(f"{source}: there are no S2FT weights in it.")
    layers: dict[str, dict[str, LayerWeights]] = {}
    for (owner, name), tensors in parts.items():
        if missing := set(TENSOR_NAMES) - set(tensors):
            raise AdapterFileError(f"{source}: {owner}.{name} lacks {sorted(missing)}.")
        if scalars := sorted(key for key, tensor in tensors.items() if tensor.ndim == 0):
            raise AdapterFileError(f"{source}: {owner}.{name}.{scalars[0]} is a single number.")
        shape = (len(tensors["row_order"]), len(tensors["column_order"]))
        layer = LayerWeights(shape, **tensors)
        try:
            check_layer(layer, config.coefficients)
        except AdapterFileError as error:
            raise AdapterFileError(f"{source}: {owner}.{name}: {error}") from None
        layers.setdefault(owner, {})[module_name(name)] = layer
    return Adapter(dict.fromkeys(layers, config), layers)
