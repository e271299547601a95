"""The adapter file: one safetensors file that holds everything needed to rebuild a weight change elsewhere.

Layout, format version 1. For every adapted layer, under `<component>.<module name>.` (component: `unet`,
`text_encoder`, and reserved `text_encoder_2`, `transformer`), for a (d, k) layer with m positions:

    coefficients   (m, 2) complex or (m,) real, float32 or float16
    positions      (m,) differences of the sorted flat positions u * k + v, the first from 0; unsigned
    row_order      (d,), column_order (k,): permutations; unsigned
    row_sign       ceil(d / 8), column_sign ceil(k / 8): bits, 1 for -1; uint8

Unsigned tensors are in the narrowest of 8, 16 and 32 bits. The header's metadata has one entry, `s2ft`: a JSON object
with `format_version`, the config of each component, each layer's shape, and `info`. (One, because safetensors writes
several in random order, and equal adapters shall make equal files.)

Reading is strict: whatever the tensors hold is checked before anyone uses it, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from .config import S2FTConfig
from .layer import S2FTLayer
from .prior import s2ft_layers

WEIGHTS_NAME = "pytorch_s2ft_weights.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "s2ft"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
THUMBNAIL_BYTES = 20 * 1024
THUMBNAIL_SIDE = 128
DTYPES = {"float32": np.float32, "float16": np.float16}
# Config fields that describe the adapter itself; target modules are the file's own keys.
CONFIG_FIELDS = (
    "n_frequency", "n_frequency_pattern", "scaling", "coefficients", "norm", "sampling", "gamma", "rearrange",
    "distance", "signs", "refine", "seed",
)  # fmt: skip


class AdapterFileError(ValueError):
    """An adapter file that cannot be used: damaged, of another kind, or for another base model."""


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
        if "thumbnail" in known:
            known["thumbnail"] = base64.b64decode(known["thumbnail"], validate=True)
        return cls(**known)


@dataclass
class LayerWeights:
    """One layer's part of an adapter, as `SpectralDelta` holds it (there: shapes and types)."""

    shape: tuple[int, int]
    coefficients: torch.Tensor
    positions: torch.Tensor
    row_order: torch.Tensor
    column_order: torch.Tensor
    row_sign: torch.Tensor
    column_sign: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in TENSOR_NAMES}


TENSOR_NAMES = tuple(f.name for f in fields(LayerWeights) if f.name != "shape")


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

    Raises ValueError if no component has it.
    """
    configs, layers = {}, {}
    for component, model in components.items():
        found = s2ft_layers(model, adapter_name)
        if found:
            configs[component] = next(iter(found.values())).s2ft_config[adapter_name]
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


def write_adapter(path: str | os.PathLike, adapter: Adapter, dtype: str = "float32") -> int:
    """Write an adapter file, beside its place first and then renamed; returns its size in bytes.

    `dtype` is that of the coefficients, "float32" or "float16". Raises ValueError for another one, or for coefficients
    that are not finite in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}.")
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    for component, layers in adapter.layers.items():
        shapes[component] = {}
        for name, layer in layers.items():
            shapes[component][name] = list(layer.shape)
            for key, array in _encode(layer, DTYPES[dtype]).items():
                tensors[f"{component}.{name}.{key}"] = array
            if not np.isfinite(tensors[f"{component}.{name}.coefficients"]).all():
                raise ValueError(f"{component}.{name} has coefficients that are not finite in {dtype}.")
    configs = {c: {name: getattr(config, name) for name in CONFIG_FIELDS} for c, config in adapter.configs.items()}
    info = adapter.info.to_json()
    info.setdefault("date", datetime.now(UTC).isoformat(timespec="seconds"))
    header = {"format_version": FORMAT_VERSION, "config": configs, "shapes": shapes, "info": info}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata=metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _narrow(values: np.ndarray) -> np.ndarray:
    largest = int(values.max(initial=0))
    return values.astype(next(t for t in (np.uint8, np.uint16, np.uint32) if largest <= np.iinfo(t).max))


def _encode(layer: LayerWeights, dtype: type) -> dict[str, np.ndarray]:
    flat = layer.positions.long()[:, 0] * layer.shape[1] + layer.positions.long()[:, 1]
    flat, sequence = flat.sort()
    with np.errstate(over="ignore"):  # what does not fit is refused by name
        coefficients = layer.coefficients[sequence].float().numpy().astype(dtype)
    return {
        "coefficients": coefficients,
        "positions": _narrow(np.diff(flat.numpy(), prepend=0)),
        "row_order": _narrow(layer.row_order.numpy()),
        "column_order": _narrow(layer.column_order.numpy()),
        "row_sign": np.packbits(layer.row_sign.numpy() < 0),
        "column_sign": np.packbits(layer.column_sign.numpy() < 0),
    }


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
        return AdapterHeader(_info(path, header), header["config"], shapes, sum(map(math.prod, sizes)))


def read_adapter(path: str | os.PathLike) -> Adapter:
    """Read and check an adapter file.

    Raises AdapterFileError, naming file and key, for anything that is not exactly as the format says: no or a truncated
    safetensors file, another format or version, missing or extra keys, positions out of range or repeated (a mirror is
    a repeat for complex coefficients), an order that is no permutation, NaN or infinite coefficients.
    """
    with _open(path) as file:
        header = _header(path, file.metadata())
        info = _info(path, header)
        keys = set(file.keys())
        expected = {
            f"{component}.{name}.{key}"
            for component, layers in header["shapes"].items()
            for name in layers
            for key in TENSOR_NAMES
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
                prefix = f"{component}.{name}"
                try:
                    arrays = {key: file.get_tensor(f"{prefix}.{key}") for key in TENSOR_NAMES}
                    layer = _decode(arrays, tuple(shape))
                    check_layer(layer, configs[component].coefficients)
                except (AdapterFileError, SafetensorError, TypeError, ValueError) as error:
                    raise AdapterFileError(f"{path}: {prefix}: {error}") from None
                layers[component][name] = layer
    return Adapter(configs, layers, info)


def _open(path: str | os.PathLike) -> safe_open:
    if not Path(path).is_file():
        raise AdapterFileError(f"{path}: there is no such file.")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path}: not a complete safetensors file ({error}).") from None


def _header(path: str | os.PathLike, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if METADATA_KEY not in (metadata or {}):
        raise AdapterFileError(f"{path}: not an S2FT adapter: its header has no {METADATA_KEY!r} entry.")
    try:
        header = json.loads(metadata[METADATA_KEY])
        if header.get("format_version") != FORMAT_VERSION:
            raise AdapterFileError(
                f"{path}: format version {header.get('format_version')!r}; this release reads {FORMAT_VERSION}."
            )
        if set(header["config"]) != set(header["shapes"]) or not header["shapes"]:
            raise ValueError("config and shapes name different components")
        for component, shapes in header["shapes"].items():
            if component not in COMPONENTS:
                raise ValueError(f"unknown component {component!r}")
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


def _decode(arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> LayerWeights:
    d, k = shape
    for key, array in arrays.items():
        if array.dtype not in ((np.float32, np.float16) if key == "coefficients" else (np.uint8, np.uint16, np.uint32)):
            raise AdapterFileError(f"{key} has type {array.dtype}.")
        if key != "coefficients" and array.ndim != 1:
            raise AdapterFileError(f"{key} has shape {array.shape}.")
    flat = arrays["positions"].astype(np.int64).cumsum()
    signs = {}
    for key, length in {"row_sign": d, "column_sign": k}.items():
        if arrays[key].dtype != np.uint8 or len(arrays[key]) != -(-length // 8):
            raise AdapterFileError(f"{key} has {len(arrays[key])} bytes for {length} signs.")
        bits = np.unpackbits(arrays[key])
        if bits[length:].any():
            raise AdapterFileError(f"{key} has bits set past its end.")
        signs[key] = torch.from_numpy(np.where(bits[:length], -1, 1).astype(np.int8))
    return LayerWeights(
        shape,
        coefficients=torch.from_numpy(arrays["coefficients"].astype(np.float32)),
        positions=torch.from_numpy(np.stack([flat // k, flat % k], axis=1).astype(np.int64)),
        row_order=torch.from_numpy(arrays["row_order"].astype(np.int64)),
        column_order=torch.from_numpy(arrays["column_order"].astype(np.int64)),
        **signs,
    )


def check_layer(layer: LayerWeights, kind: str) -> None:
    """Raise AdapterFileError for tensors that make no valid layer; else bring integers to `SpectralDelta`'s types."""
    d, k = layer.shape
    count = len(layer.positions)
    expected = (count, 2) if kind == "complex" else (count,)
    if count == 0 or layer.positions.shape != (count, 2):
        raise AdapterFileError(f"positions have shape {tuple(layer.positions.shape)}.")
    if tuple(layer.coefficients.shape) != expected:
        raise AdapterFileError(
            f"{kind} coefficients have shape {tuple(layer.coefficients.shape)}, {count} positions need {expected}."
        )
    if not torch.isfinite(layer.coefficients).all():
        raise AdapterFileError("coefficients have NaN or infinite entries.")
    u, v = layer.positions.long().unbind(1)
    if bool(((u < 0) | (u >= d) | (v < 0) | (v >= k)).any()):
        raise AdapterFileError(f"positions lie outside the {d}x{k} spectrum.")
    flat = u * k + v
    if kind == "complex":
        flat = torch.minimum(flat, (-u % d) * k + (-v % k))
    if len(flat.unique()) != count:
        raise AdapterFileError("positions are repeated" + (" (a mirror counts)." if kind == "complex" else "."))
    for key, length in {"row_order": d, "column_order": k}.items():
        order = getattr(layer, key).long()
        if order.shape != (length,) or not torch.equal(order.sort().values, torch.arange(length)):
            raise AdapterFileError(f"{key} is no permutation of 0..{length - 1}.")
    for key, length in {"row_sign": d, "column_sign": k}.items():
        sign = getattr(layer, key)
        if sign.shape != (length,) or not bool((sign.abs() == 1).all()):
            raise AdapterFileError(f"{key} must be {length} times +1 or -1.")
    layer.positions = layer.positions.int()
    layer.row_order, layer.column_order = layer.row_order.int(), layer.column_order.int()
    layer.row_sign, layer.column_sign = layer.row_sign.to(torch.int8), layer.column_sign.to(torch.int8)


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
        parts.setdefault(place, {})[tensor_name] = tensor.detach().cpu()
    if not parts:
        raise AdapterFileError(f"{source}: there are no S2FT weights in it.")
    layers: dict[str, dict[str, LayerWeights]] = {}
    for (owner, name), tensors in parts.items():
        if missing := set(TENSOR_NAMES) - set(tensors):
            raise AdapterFileError(f"{source}: {owner}.{name} lacks {sorted(missing)}.")
        shape = (len(tensors["row_order"]), len(tensors["column_order"]))
        layer = LayerWeights(shape, **tensors)
        try:
            check_layer(layer, config.coefficients)
        except AdapterFileError as error:
            raise AdapterFileError(f"{source}: {owner}.{name}: {error}") from None
        layers.setdefault(owner, {})[module_name(name)] = layer
    return Adapter(dict.fromkeys(layers, config), layers)
