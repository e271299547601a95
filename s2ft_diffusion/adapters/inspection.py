"""What an adapter is, and whether it fits a base, from files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import lora_files
from .base_files import base_folder, pipeline_class, stored_name, weight_shapes
from .lora_files import Shapes
from .sources import Source, is_s2ft, layer_shapes, read
from .weights import GridWeights


def describe(source: Source, base: Source | None = None) -> dict[str, Any]:
    """What an S2FT adapter is, as plain values: its info, configs, and for every layer shape, numbers, rank and energy.

    The energy is ||change||^2 (Frobenius), its scaling included; `share` is that of all layers'.
    """
    adapter = read(source, base)
    layers = []
    for component, found in adapter.layers.items():
        for name, layer in found.items():
            size = layer.change_norm(layer.coefficients.float()) * adapter.configs[component].scaling
            layers.append(
                {
                    "component": component,
                    "name": name,
                    "shape": list(layer.shape),
                    "numbers": layer.coefficients.numel(),
                    "rank": layer.rank if isinstance(layer, GridWeights) else None,
                    "energy": size**2,
                }
            )
    total = math.fsum(layer["energy"] for layer in layers)
    for layer in layers:
        layer["share"] = layer["energy"] / total if total else 0.0
    info = adapter.info.to_json()
    if "thumbnail" in info:
        info["thumbnail"] = len(adapter.info.thumbnail or b"")
    return {
        "info": info,
        "configs": {c: _plain(config) for c, config in adapter.configs.items()},
        "numbers": adapter.trainable,
        "energy": total,
        "layers": layers,
    }


def _plain(config: Any) -> dict[str, Any]:
    from .reading import CONFIG_FIELDS

    return {name: getattr(config, name) for name in CONFIG_FIELDS}


def verify(source: Source, base: Source) -> list[str]:
    """What keeps an adapter from fitting a base model, one line each; of the base only headers are read.

    Raises AdapterFileError for an adapter or a base that cannot be read.
    """
    folder = base_folder(base)
    shapes = weight_shapes(folder)
    if is_s2ft(source):
        found = layer_shapes(read(source, base))
    else:
        try:
            lora = lora_files.read_lora(source, shapes)
        except lora_files.NoSuchLayer as problem:
            return [str(problem)]
        found = {c: {n: layer.shape for n, layer in layers.items()} for c, layers in lora.layers.items()}
    return misfits(found, shapes, pipeline_class(folder))


def misfits(
    adapter: Mapping[str, Mapping[str, tuple[int, int]]], base: Shapes, pipeline: str | None = None
) -> list[str]:
    """Layers (d, k) by component that a base's weights have no equal for, in words."""
    problems = []
    for component, layers in adapter.items():
        if component not in base:
            problems.append(
                f"the base{f', a {pipeline},' if pipeline else ''} has no {component} in safetensors files."
            )
            continue
        for name, (d, k) in layers.items():
            stored = stored_name(name, base[component])
            if stored is None:
                problems.append(f"{component}.{name}: the base has no such layer.")
                continue
            shape = base[component][stored]
            if len(shape) < 2 or (shape[0], math.prod(shape[1:])) != (d, k):
                found = "x".join(map(str, (shape[0], math.prod(shape[1:]))))
                problems.append(f"{component}.{name}: the adapter has {d}x{k}, the base {found}.")
    return problems
