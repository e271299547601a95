"""Adapters for other tools and from them, by files: what `python -m s2ft_diffusion` does, as functions.

    from s2ft_diffusion import convert
    convert.convert("dog/", "dog-lora.safetensors", to="kohya")
    convert.merge("base/", [("dog/", 1.0)], "base-with-dog/")

A source is an S2FT file, a folder with one, or what PEFT's `save_pretrained` wrote; where it says so, LoRA files too.
`progress` shows how far a long conversion is (`silent` by default).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..text import printable
from . import lora_files, tool_names
from .base_files import base_folder, check_copy, merge_into, stored_name, weight_shapes
from .file import WrittenAdapter, write_adapter
from .inspection import describe, misfits, verify
from .lora import Errors, Lora, Progress, add_loras, difference, silent, to_lora
from .lora_files import Shapes, write_lora
from .places import lies_in, same_place
from .reading import COMPONENTS, WEIGHTS_NAME, Adapter, AdapterFileError
from .sources import Source, is_s2ft, layer_shapes, read

__all__ = ["FORMATS", "Converted", "add", "convert", "describe", "export", "extract", "find_kernels", "merge",
           "misfits", "read", "read_as_lora", "verify"]  # fmt: skip

Format = Literal["lora", "peft", "kohya", "comfyui", "s2ft"]
FORMATS: tuple[Format, ...] = ("lora", "peft", "kohya", "comfyui", "s2ft")
LORA_DTYPES = ("float32", "float16", "bfloat16")
PEFT_NAMES = (lora_files.PEFT_WEIGHTS_NAME, lora_files.PEFT_CONFIG_NAME)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: bytes, the smallest and largest rank of a LoRA, and how far it is from the source."""

    bytes: int
    ranks: tuple[int, int] | None
    errors: Errors | None
    relative_error: float


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
        rank: of the LoRA. At free positions it or `error` is needed; on a grid the LoRA is exact without.
        error: the largest relative error that the LoRA may have.
        dense: whole weight changes instead of factors (kohya and comfyui), exact at free positions.
        base: the base model's folder; for the kernels of convolutions where names don't tell them, and for FourierFT.

    Raises AdapterFileError for a source that cannot be read, ValueError for what the format has no place for.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {FORMATS}, got {to!r}.")
    _check(rank, error, dense, to)
    _check_out(out, to, [source], base)
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


def _check_out(out: Source, to: str, sources: Sequence[Source], base: Source | None = None) -> None:
    """Before the work: that a file is no folder, a folder no file, that neither would be within a file, and that
    nothing is written over what is read, by whatever path."""
    path = Path(out)
    if to == "peft" and path.is_file():
        raise ValueError(f"{out} is a file: peft's adapters are folders.")
    if to != "peft" and path.is_dir():
        raise ValueError(f"{out} is a folder: give the name of a file.")
    within = next((parent for parent in path.parents if parent.exists()), None)
    if within is not None and not within.is_dir():
        raise ValueError(f"{out}: {within} is a file, not a folder.")
    folders = [path, *(path / component for component in COMPONENTS)]
    written = [f / name for f in folders for name in PEFT_NAMES] if to == "peft" else [path]
    for source in sources:
        names = (WEIGHTS_NAME, lora_files.LORA_NAME, *PEFT_NAMES)
        read = [source, *(Path(source) / part / name for part in ("", *COMPONENTS) for name in names)]
        if any(same_place(one, other) for one in read for other in (path, *written)):
            raise ValueError(f"{out} would be written over {source}: give another place.")
    if base is not None and lies_in(path, base_folder(base)):
        raise ValueError(f"{out} lies in the base {base}: give another place.")


def _title(adapter: Adapter, out: Source) -> str:
    return adapter.info.subject or printable(Path(out).stem)


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
    described = lora_files.describe_adapter(adapter.info, layer_shapes(adapter), _title(adapter, out))
    return Converted(lora_files.write_tensors(out, tensors, described), None, errors, errors.total)


def find_kernels(adapter: Adapter, base: Shapes | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """The kernels of an adapter's layers, () for linear ones: from its file, the base's weights, or a U-Net's names.

    Raises ValueError, asking for the base, for a layer whose kind none of them says, and AdapterFileError for a base
    that has no such layer.
    """
    shapes = layer_shapes(adapter)
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
            elif name.rpartition(".")[2].startswith("conv"):
                kernel = None
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
) -> tuple[Lora, Errors]:
    """An S2FT adapter or a LoRA file as a LoRA, and how far that is from it, a LoRA file's not at all.

    Raises AdapterFileError and ValueError as `convert` does.
    """
    shapes = weight_shapes(base_folder(base)) if base else None
    if not is_s2ft(source):
        return lora_files.read_lora(source, shapes), Errors()
    adapter = read(source, base)
    try:
        return to_lora(adapter, rank=rank, error=error, kernels=find_kernels(adapter, shapes), progress=progress)
    except ValueError as problem:
        raise type(problem)(f"{source}: {problem}") from None


def merge(base: Source, adapters: Sequence[tuple[Source, float]], out: Source, *, progress: Progress = silent) -> None:
    """Write a copy of a base model with adapters (S2FT or LoRA) times their weights in it.

    `base` is a folder in diffusers' layout or "toybox". Names, shards and types of the weights stay; each sum is made
    in float32. Raises AdapterFileError for an adapter that doesn't fit, FileExistsError for an `out` with files in it.
    """
    folder = base_folder(base)
    check_copy(folder, Path(out))
    shapes = weight_shapes(folder)
    deltas: dict[str, dict[str, list[Any]]] = {}
    for source, weight in adapters:
        if is_s2ft(source):
            adapter = read(source, base)
            problems = misfits(layer_shapes(adapter), shapes)
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

    `rank` or `error`, of each S2FT adapter's part, are needed for adapters at free positions; the errors are then those
    of the parts, added up, and what rounding adds. Raises AdapterFileError and ValueError as `convert`
    does, and ValueError for adapters of different bases.
    """
    if dtype not in LORA_DTYPES:
        raise ValueError(f"dtype must be one of {LORA_DTYPES}, got {dtype!r}.")
    _check(rank, error, False, to)
    _check_out(out, to, [source for source, _ in adapters], base)
    parts = [
        (read_as_lora(source, rank=rank, error=error, base=base, progress=progress), weight)
        for source, weight in adapters
    ]
    total = add_loras([(lora, weight) for (lora, _), weight in parts])
    errors = Errors()
    for component, layers in total.layers.items():
        for name, layer in layers.items():
            layers[name] = stored = layer.balanced().to(getattr(torch, dtype))
            place = component, name
            lost = sum(abs(weight) * found.layers[place][0] for (_, found), weight in parts if place in found.layers)
            # What the nearest changes of a rank lack is at right angles to them.
            errors.layers[place] = (lost + difference(layer, stored), math.hypot(layer.norm(), lost))
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

    _check_out(out, "s2ft", [source], base)
    lora = lora_files.read_lora(source, weight_shapes(base_folder(base)) if base else None)
    config = S2FTConfig(n_frequency=n_frequency, oversampling=oversampling)
    adapter, errors = extract_adapter(lora, config, progress=progress)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    written = write_adapter(out, adapter, dtype)
    return Converted(written.bytes, None, errors, math.hypot(errors.total, written.relative_error))
