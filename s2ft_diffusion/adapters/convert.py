"""Adapters for other tools and from them, by files: what `python -m s2ft_diffusion` does, as functions.

    from s2ft_diffusion import convert
    convert.convert("dog/", "dog-lora.safetensors", to="kohya")
    convert.merge("base/", [("dog/", 1.0)], "base-with-dog/")

A source is an S2FT file, a folder with one, or what PEFT's `save_pretrained` wrote; where it says so, LoRA files too.
`progress` shows how far a long conversion is (`silent` by default).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from . import lora_files, tool_names
from .base_files import base_folder, merge_into, pipeline_class, stored_name, weight_shapes
from .file import WrittenAdapter, write_adapter
from .lora import Errors, Lora, Progress, add_loras, difference, silent, to_lora
from .lora_files import Shapes, write_lora
from .reading import METADATA_KEY, Adapter, AdapterFileError
from .weights import GridWeights

Format = Literal["lora", "peft", "kohya", "comfyui", "s2ft"]
FORMATS: tuple[Format, ...] = ("lora", "peft", "kohya", "comfyui", "s2ft")
LORA_DTYPES = ("float32", "float16", "bfloat16")

Source = str | os.PathLike


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: bytes, the smallest and largest rank of a LoRA, and how far it is from the source."""

    bytes: int
    ranks: tuple[int, int] | None
    errors: Errors | None
    relative_error: float


def read(source: Source, base: Source | None = None) -> Adapter:
    """Read an S2FT adapter of any kind, or a FourierFT adapter that PEFT saved, which needs its `base`.

    Raises AdapterFileError, also for a FourierFT adapter without a base.
    """
    from ..pipelines.sources import find_adapter_file, read_any_adapter
    from .extract import is_fourierft, read_fourierft

    if not Path(source).exists():  # a repository's name is for pipelines: a mistyped file must not wait for the hub
        raise AdapterFileError(f"{source}: there is no such file or folder.")
    if is_fourierft(source):
        if base is None:
            raise AdapterFileError(f"{source}: a FourierFT adapter, whose positions depend on its base model: give it.")
        return read_fourierft(source, weight_shapes(base_folder(base)))
    return read_any_adapter(find_adapter_file(source), "unet")


def is_s2ft(source: Source) -> bool:
    """Whether a source is an S2FT adapter (of a FourierFT one, PEFT's): if not, it may be a LoRA."""
    from .extract import is_fourierft

    path = Path(source)
    if path.is_dir():
        from ..pipelines.sources import WEIGHTS_NAME

        return (path / WEIGHTS_NAME).is_file() or _peft_type(path) == "S2FT" or is_fourierft(path)
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _peft_type(folder: Path) -> str | None:
    import json

    try:
        return json.loads((folder / lora_files.PEFT_CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None


def convert(
    source: Source,
    out: Source,
    *,
    to: Format,
    dtype: str = "float16",
    rank: int | None = None,
    error: float | None = None,
    dense: bool = False,
    base: Source | None = None,
    progress: Progress = silent,
) -> Converted:
    """Write an adapter in another format; returns what was written.

    Args:
        to: "lora" (diffusers), "peft" (a folder), "kohya" (A1111, Forge, sd-scripts), "comfyui", or "s2ft".
        dtype: of the numbers: "float32", "float16", "bfloat16", for S2FT files also "int8".
        rank, error: the rank of the LoRA, or the largest relative error it may have; at free positions one is needed,
            on a grid the LoRA is exact without.
        dense: whole weight changes instead of factors (kohya and comfyui), exact at free positions.
        base: the base model's folder; for the kernels of convolutions where names don't tell them, and for FourierFT.

    Raises AdapterFileError for a source that cannot be read, ValueError for what the format has no place for.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {FORMATS}, got {to!r}.")
    _check(rank, error, dense, to)
    _check_out(out, to)
    adapter = read(source, base)
    if to == "s2ft":
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        written: WrittenAdapter = write_adapter(out, adapter, dtype)
        return Converted(written.bytes, None, None, written.relative_error)
    return export(adapter, out, to=to, dtype=dtype, rank=rank, error=error, dense=dense, base=base, progress=progress)


def export(
    adapter: Adapter,
    out: Source,
    *,
    to: tool_names.Tool,
    dtype: str = "float16",
    rank: int | None = None,
    error: float | None = None,
    dense: bool = False,
    base: Source | None = None,
    progress: Progress = silent,
) -> Converted:
    """`convert` for an adapter that has been read, to the formats of other tools."""
    if dtype not in LORA_DTYPES:
        raise ValueError(f"dtype must be one of {LORA_DTYPES} for {to}, got {dtype!r}.")
    kind = getattr(torch, dtype)
    kernels = find_kernels(adapter, weight_shapes(base_folder(base)) if base else None)
    if dense:
        return _write_dense(adapter, Path(out), to, kind, kernels, progress)
    lora, errors = to_lora(adapter, rank=rank, error=error, dtype=kind, kernels=kernels, progress=progress)
    written = write_lora(out, lora, to, title=_title(adapter, out))
    return Converted(written, lora.ranks, errors, errors.total)


def _check(rank: int | None, error: float | None, dense: bool, to: str) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"error must be at least 0 and below 1, got {error}.")
    if dense and (rank is not None or error is not None):
        raise ValueError("dense changes are whole: they have neither a rank nor an error.")
    if to == "s2ft" and (rank is not None or error is not None or dense):
        raise ValueError("rank, error and dense are for LoRA files.")


def _check_out(out: Source, to: str) -> None:
    """Before the work: that a file is no folder, a folder no file, and that neither would be within a file."""
    path = Path(out)
    if to == "peft" and path.is_file():
        raise ValueError(f"{out} is a file: peft's adapters are folders.")
    if to != "peft" and path.is_dir():
        raise ValueError(f"{out} is a folder: give the name of a file.")
    within = next((parent for parent in path.parents if parent.exists()), None)
    if within is not None and not within.is_dir():
        raise ValueError(f"{out}: {within} is a file, not a folder.")


def _title(adapter: Adapter, out: Source) -> str:
    return adapter.info.subject or Path(out).stem


def _write_dense(
    adapter: Adapter, out: Path, to: tool_names.Tool, dtype: torch.dtype, kernels: Mapping[str, Any], progress: Progress
) -> Converted:
    places = [(component, name) for component, layers in adapter.layers.items() for name in layers]
    changes: dict[str, dict[str, torch.Tensor]] = {c: {} for c in adapter.layers}
    errors = Errors()
    for component, name in progress(places, "convert"):
        exact = adapter.layers[component][name].delta() * adapter.configs[component].scaling
        stored = exact.to(dtype)
        if not torch.isfinite(stored).all():
            raise ValueError(f"{component}.{name}: a change that is not finite in {dtype}.")
        errors.layers[component, name] = (float((stored.float() - exact).norm()), float(exact.norm()))
        kernel = kernels.get(component, {}).get(name, ())
        changes[component][name] = stored.view(len(stored), -1, *kernel) if kernel else stored
    tensors = lora_files.dense_state_dict(changes, to)
    described = lora_files.describe_adapter(adapter.info, _shapes(adapter), _title(adapter, out))
    return Converted(lora_files.write_tensors(out, tensors, described), None, errors, errors.total)


def _shapes(adapter: Adapter) -> dict[str, dict[str, tuple[int, int]]]:
    return {c: {name: layer.shape for name, layer in layers.items()} for c, layers in adapter.layers.items()}


def find_kernels(adapter: Adapter, base: Shapes | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """The kernels of an adapter's layers, () for linear ones: from its file, the base's weights, or a U-Net's names.

    Raises ValueError, asking for the base, for a layer whose kind none of them says, and AdapterFileError for a base
    that has no such layer.
    """
    shapes = _shapes(adapter)
    context = tool_names.context_width(shapes)
    found: dict[str, dict[str, tuple[int, ...]]] = {c: {} for c in shapes}
    for component, layers in shapes.items():
        known = adapter.kernels.get(component)
        for name, shape in layers.items():
            kernel: tuple[int, ...] | None = ()
            if known is not None:
                kernel = known.get(name, ())
            elif base is not None:
                kernel = _stored_shape(base, component, name)[2:]
            elif component == "unet":
                kernel = tool_names.kernel_size(name, shape, context)
            if kernel is None:
                raise ValueError(
                    f"{component}.{name} may be a linear layer or a convolution, which this file doesn't say: "
                    "give the base model."
                )
            found[component][name] = kernel
    return found


def _stored_shape(base: Shapes, component: str, name: str) -> tuple[int, ...]:
    shapes = base.get(component, {})
    stored = stored_name(name, shapes)
    if stored is None:
        raise AdapterFileError(f"the base model has no layer {component}.{name}.")
    return shapes[stored]


# Merging and adding --------------------------------------------------------------------------------------------------


def read_as_lora(
    source: Source,
    *,
    rank: int | None = None,
    error: float | None = None,
    base: Source | None = None,
    progress: Progress = silent,
) -> Lora:
    """An S2FT adapter or a LoRA file as a LoRA. Raises AdapterFileError and ValueError as `convert` does."""
    shapes = weight_shapes(base_folder(base)) if base else None
    if not is_s2ft(source):
        return lora_files.read_lora(source, shapes)
    adapter = read(source, base)
    try:
        return to_lora(adapter, rank=rank, error=error, kernels=find_kernels(adapter, shapes), progress=progress)[0]
    except ValueError as problem:
        raise type(problem)(f"{source}: {problem}") from None


def merge(base: Source, adapters: Sequence[tuple[Source, float]], out: Source, *, progress: Progress = silent) -> None:
    """Write a copy of a base model with adapters (S2FT or LoRA) times their weights in it.

    `base` is a folder in diffusers' layout or "toybox". Names, shards and types of the weights stay; each sum is made
    in float32. Raises AdapterFileError for an adapter that doesn't fit, FileExistsError for an `out` with files in it.
    """
    folder = base_folder(base)
    shapes = weight_shapes(folder)
    deltas: dict[str, dict[str, list[Any]]] = {}
    for source, weight in adapters:
        if is_s2ft(source):
            adapter = read(source, base)
            problems = misfits(_shapes(adapter), shapes)
            found = {
                c: {n: partial(_scaled, layer.delta, adapter.configs[c].scaling * weight) for n, layer in x.items()}
                for c, x in adapter.layers.items()
            }
        else:
            lora = lora_files.read_lora(source, shapes)
            problems = misfits({c: {n: y.shape for n, y in x.items()} for c, x in lora.layers.items()}, shapes)
            found = {
                c: {n: partial(_scaled, layer.delta, weight) for n, layer in x.items()} for c, x in lora.layers.items()
            }
        if problems:
            raise AdapterFileError(f"{source} does not fit {base}: {problems[0]}")
        for component, layers in found.items():
            for name, delta in layers.items():
                stored = stored_name(name, shapes[component])  # adapters may differ in CLIP's inner name
                deltas.setdefault(component, {}).setdefault(stored, []).append(delta)
    summed = {c: {n: partial(_sum, parts) for n, parts in layers.items()} for c, layers in deltas.items()}
    merge_into(folder, summed, Path(out), progress)


def _scaled(delta: Any, factor: float) -> torch.Tensor:
    return delta() * factor


def _sum(parts: Sequence[Any]) -> torch.Tensor:
    return sum((part() for part in parts[1:]), start=parts[0]())


def add(
    adapters: Sequence[tuple[Source, float]],
    out: Source,
    *,
    to: tool_names.Tool = "lora",
    dtype: str = "float16",
    rank: int | None = None,
    error: float | None = None,
    base: Source | None = None,
    progress: Progress = silent,
) -> Converted:
    """Write the weighted sum of adapters (S2FT or LoRA) of one base as one LoRA: exactly, by concatenation.

    `rank` or `error` are needed for adapters at free positions. Raises AdapterFileError and ValueError as `convert`
    does, and ValueError for adapters of different bases.
    """
    if dtype not in LORA_DTYPES:
        raise ValueError(f"dtype must be one of {LORA_DTYPES}, got {dtype!r}.")
    _check(rank, error, False, to)
    _check_out(out, to)
    parts = [
        (read_as_lora(source, rank=rank, error=error, base=base, progress=progress), weight)
        for source, weight in adapters
    ]
    total = add_loras(parts)
    errors = Errors()
    for component, layers in total.layers.items():
        for name, layer in layers.items():
            layers[name] = stored = layer.balanced().to(getattr(torch, dtype))
            errors.layers[component, name] = (difference(layer, stored), layer.norm())
    written = write_lora(out, total, to, title=total.info.subject)
    return Converted(written, total.ranks, errors, errors.total)


def extract(
    source: Source,
    out: Source,
    *,
    n_frequency: int | float = 8000,
    oversampling: int = 1,
    dtype: str = "float16",
    base: Source | None = None,
    progress: Progress = silent,
) -> Converted:
    """Write a LoRA file as an S2FT adapter on a grid of `n_frequency` numbers a layer; returns how far it is from it.

    `base` is needed for kohya's names. Raises AdapterFileError for what is no LoRA, and ValueError as `extract_adapter`
    does.
    """
    from ..tuner.config import S2FTConfig
    from .extract import extract_adapter

    _check_out(out, "s2ft")
    lora = lora_files.read_lora(source, weight_shapes(base_folder(base)) if base else None)
    config = S2FTConfig(n_frequency=n_frequency, oversampling=oversampling)
    adapter, errors = extract_adapter(lora, config, progress=progress)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    written = write_adapter(out, adapter, dtype)
    return Converted(written.bytes, None, errors, math.hypot(errors.total, written.relative_error))


# Looking at a file ---------------------------------------------------------------------------------------------------


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
        found = _shapes(read(source, base))
    else:
        lora = lora_files.read_lora(source, shapes)
        found = {c: {n: layer.shape for n, layer in layers.items()} for c, layers in lora.layers.items()}
    return misfits(found, shapes, pipeline_class(folder))


def misfits(
    adapter: Mapping[str, Mapping[str, tuple[int, int]]], base: Shapes, pipeline: str | None = None
) -> list[str]:
    """Layers (d, k) by component that a base's weights have no equal for, in words."""
    problems = []
    for component, layers in adapter.items():
        if component not in base:
            problems.append(f"the base{f', a {pipeline},' if pipeline else ''} has no {component}.")
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
