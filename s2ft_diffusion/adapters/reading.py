"""Reading adapter files with torch, numpy and safetensors alone: what a program without diffusers and PEFT needs.

Reading is strict: whatever the tensors hold is checked before anyone uses it, and nothing is ever unpickled. `file`
reads with this, and adds PEFT's config and writing.
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open

from ..text import decoded, printable
from .format import FORMAT_VERSION, decode_layer, tensor_names
from .names import canonical_name
from .weights import AdapterFileError, LayerWeights

WEIGHTS_NAME = "pytorch_s2ft_weights.safetensors"
METADATA_KEY = "s2ft"
MOST_ROWS = 2**20  # and columns, of a layer: above any known model's. A reader's memory grows with what a header says.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# Config fields that describe the adapter itself; target modules are the file's own keys.
CONFIG_FIELDS = (
    "n_frequency", "n_frequency_pattern", "positions", "oversampling", "scaling", "coefficients", "norm", "sampling",
    "gamma", "rearrange", "distance", "signs", "refine", "seed",
)  # fmt: skip
BEFORE_VERSION_4 = {"positions": "free", "oversampling": 1}  # what configs did not say then


@dataclass
class AdapterInfo:
    """What a file says about itself beside the numbers; every field may be unknown.

    Attributes:
        base_model: hub id or folder of the base that it was trained on.
        instance_prompt: the prompt of training, which names the subject: "a photo of sks dog".
        subject: what the subject is called.
        class_name: what it is: "dog".
        date: when it was trained: "2026-01-31".
        training: plain facts (steps, learning rate, loss, ...).
        thumbnail: a WebP image of at most 20 KiB.
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
    """An adapter apart from any model: configs and layers by component, and what is known about it.

    A config has the `CONFIG_FIELDS` as attributes: an `S2FTConfig`, or a `StoredConfig` where PEFT is not wanted.
    `kernels` are the kernel sizes of convolutions, which a LoRA of them needs; a component that is not there is of a
    file that does not say which of its layers are convolutions.
    """

    configs: dict[str, Any]
    layers: dict[str, dict[str, LayerWeights]]
    info: AdapterInfo = field(default_factory=AdapterInfo)
    kernels: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """Real trainable numbers in all."""
        return sum(layer.coefficients.numel() for layers in self.layers.values() for layer in layers.values())


@dataclass(frozen=True)
class AdapterHeader:
    """What a file's header says.

    Attributes:
        info: what it says about itself.
        configs: fields of the `S2FTConfig` of each component ("unet", "transformer", "text_encoder", ...).
        shapes: (rows, columns) of each layer's weight change, by component and layer.
        trainable: real trainable numbers in all.
    """

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
        shapes = {
            component: {canonical_name(component, name): tuple(shape) for name, shape in layers.items()}
            for component, layers in header["shapes"].items()
        }
        if len(sizes) != (count := sum(map(len, shapes.values()))):
            raise AdapterFileError(f"{path}: it has coefficients of {len(sizes)} layers, its header speaks of {count}.")
        return AdapterHeader(_info(path, header), header["config"], shapes, sum(map(math.prod, sizes)))


class StoredConfig(SimpleNamespace):
    """A file's config: what a weight change depends on has been checked, the rest is as it stands there."""

    def __init__(self, **values: Any) -> None:
        """Raises ValueError for values that no weight change can be made with."""
        super().__init__(**values)
        if self.positions not in ("grid", "free"):
            raise ValueError(f"positions {self.positions!r}")
        if self.coefficients not in ("complex", "real") or self.norm not in ("ortho", "backward"):
            raise ValueError(f"coefficients {self.coefficients!r}, norm {self.norm!r}")
        if type(self.scaling) not in (int, float) or not math.isfinite(self.scaling):
            raise ValueError(f"scaling {self.scaling!r}")


def read_stored(path: str | os.PathLike, make_config: Callable[..., Any] = StoredConfig) -> Adapter:
    """Read and check an adapter file, its configs made by `make_config` of the `CONFIG_FIELDS`.

    Raises AdapterFileError, naming file and key, for anything that is not exactly as the format says: no or a truncated
    safetensors file, another format or version, missing or extra keys, positions out of range or repeated (a mirror is
    a repeat for complex coefficients), an order that is no permutation, NaN or infinite coefficients. Coefficients keep
    the file's type where it is a floating one.
    """
    with _open(path) as file:
        header = _header(path, file.metadata())
        info = _info(path, header)
        keys = set(file.keys())
        version = header["format_version"]
        configs = {c: _config(path, c, header, make_config) for c in header["shapes"]}
        names = {c: tensor_names(version, header.get("dtype"), config.positions) for c, config in configs.items()}
        expected = {
            f"{component}.{name}.{key}"
            for component, layers in header["shapes"].items()
            for name in layers
            for key in names[component]
        }
        if missing := sorted(expected - keys):
            raise AdapterFileError(f"{path}: {len(missing)} keys are missing, the first is {missing[0]!r}.")
        if extra := sorted(keys - expected):
            raise AdapterFileError(f"{path}: {len(extra)} keys do not belong there, the first is {extra[0]!r}.")
        adapted: dict[str, dict[str, LayerWeights]] = {}
        for component, shapes in header["shapes"].items():
            config = configs[component]
            options = {"positions": config.positions, "kind": config.coefficients, "norm": config.norm}
            adapted[component] = {}
            for name, shape in shapes.items():
                prefix = f"{component}.{name}"
                try:
                    # Copies: a tensor that is a view of the mapped file would keep all of it in memory.
                    tensors = {key: file.get_tensor(f"{prefix}.{key}").clone() for key in names[component]}
                    layer = decode_layer(tensors, tuple(shape), version, **options)
                except (AdapterFileError, SafetensorError, TypeError, ValueError) as error:
                    raise AdapterFileError(f"{path}: {prefix}: {error}") from None
                # Interned: a hundred adapters of a base have the same names.
                adapted[component][sys.intern(canonical_name(component, name))] = layer
    kernels = {
        component: {canonical_name(component, name): tuple(kernel) for name, kernel in found.items()}
        for component, found in header.get("kernels", {}).items()
    }
    return Adapter(configs, adapted, info, kernels)


def _open(path: str | os.PathLike) -> safe_open:
    if not Path(path).is_file():
        raise AdapterFileError(f"{path}: there is no such file.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None


def unreadable(path: str | os.PathLike, error: Exception) -> AdapterFileError:
    """What to raise for a file that safetensors cannot open, which it cannot either where a name is no UTF-8."""
    try:
        decoded(os.fspath(path))
    except UnicodeDecodeError:
        return AdapterFileError(f"{printable(path)}: its name, or a folder's, is not UTF-8; rename it.")
    return AdapterFileError(f"{path}: not a complete safetensors file ({error}).")


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
            if len({canonical_name(component, name) for name in shapes}) < len(shapes):
                raise ValueError(f"{component} has a layer under two names")
            for name, shape in shapes.items():
                if len(shape) != 2 or not all(type(n) is int and 0 < n <= MOST_ROWS for n in shape):
                    raise ValueError(f"{component}.{name} has shape {shape}")
        for component, kernels in header.get("kernels", {}).items():
            for name, kernel in kernels.items():
                columns = header["shapes"][component][name][1]
                whole = 1 <= len(kernel) <= 3 and all(type(n) is int and n > 0 for n in kernel)
                if not whole or columns % math.prod(kernel):
                    raise ValueError(f"{component}.{name} has a kernel {kernel} and {columns} columns")
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


def _config(path: str | os.PathLike, component: str, header: Mapping[str, Any], make_config: Callable[..., Any]) -> Any:
    values = header["config"][component]
    try:
        if header["format_version"] < 4:
            values = {**BEFORE_VERSION_4, **values}
        if different := set(values) ^ set(CONFIG_FIELDS):
            raise ValueError(f"unknown or missing fields {sorted(different)}")
        return make_config(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path}: the config of {component} is damaged ({error}).") from None
