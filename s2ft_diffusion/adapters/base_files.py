"""A base model as its files: the shapes of its layers from safetensors headers, and copies with adapters merged in."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .lora import Progress, silent
from .places import lies_in
from .reading import COMPONENTS, AdapterFileError, unreadable

Delta = Callable[[], torch.Tensor]  # makes a layer's weight change (d, k), float32


def base_folder(base: str | os.PathLike) -> Path:
    """The folder of a base in diffusers' layout, or of an embedded one. Raises AdapterFileError for no such."""
    from ..toybox import resolve

    folder = Path(resolve(base))
    index = folder / "model_index.json"
    if not index.is_file():
        raise AdapterFileError(f"{base}: no folder in diffusers' layout (it has no model_index.json).")
    try:
        readable = isinstance(json.loads(index.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise AdapterFileError(f"{base}: its model_index.json cannot be read.")
    return folder


def weight_shapes(base: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the weights (out, in / groups, *kernel) of a base, by component and layer, from headers alone.

    Components that are not in safetensors files are left out.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for component in COMPONENTS:
        for path in sorted((base / component).glob("*.safetensors")):  # of every variant
            shapes = found.setdefault(component, {})
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        if key.endswith(".weight"):
                            shapes[key.removesuffix(".weight")] = tuple(file.get_slice(key).get_shape())
            except (SafetensorError, OSError) as error:
                raise unreadable(path, error) from None
    return found


def stored_name(name: str, stored: Mapping[str, object]) -> str | None:
    """What a layer is called in a base's files, where CLIP's inner `text_model` may be or not; None for no such."""
    inner = name.removeprefix("text_model.")
    return next((n for n in (name, inner, f"text_model.{inner}") if n in stored), None)


def check_copy(base: Path, out: Path) -> None:
    """Raise AdapterFileError for a folder in the base, FileExistsError for one that is there and not empty."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):  # a link to nothing is there too
        raise FileExistsError(f"{out} exists already.")
    if lies_in(out, base):
        raise AdapterFileError(f"{out} lies in the base {base}.")


def merge_into(base: Path, changes: Mapping[str, Mapping[str, Delta]], out: Path, progress: Progress = silent) -> None:
    """Copy a base to the folder `out` with weight changes added, shard by shard; names, types and headers stay.

    The sum is made in float32 and rounded to the weight's type. `out` is there whole, or not at all. Raises
    AdapterFileError for a layer that is missing, quantised or of another shape, FileExistsError for an `out` that is
    there and not empty.
    """
    check_copy(base, out)
    shapes = weight_shapes(base)
    wanted = {c: _stored(base, c, layers, shapes.get(c, {})) for c, layers in changes.items()}
    files = _files(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for path in progress(files, "merge"):
            relative = path.relative_to(base)
            target = work / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            component = relative.parts[0]
            if component in wanted and path.suffix == ".safetensors" and len(relative.parts) == 2:
                _merge_file(path, wanted[component], target)
            else:
                shutil.copyfile(path, target)
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, through links too, but for links to a folder that they lie in."""
    found = []
    for place, inside, names in os.walk(folder, followlinks=True):
        here = Path(place)
        inside[:] = [name for name in inside if not lies_in(here, here / name)]
        found += [here / name for name in names if (here / name).is_file()]
    return sorted(found)


def _stored(
    base: Path, component: str, layers: Mapping[str, Delta], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Delta]:
    found = {}
    for name, delta in layers.items():
        stored = stored_name(name, shapes)
        if stored is None:
            raise AdapterFileError(f"{base}: there is no weight of {component}.{name} in its files.")
        found[f"{stored}.weight"] = delta
    return found


def _merge_file(path: Path, changes: Mapping[str, Delta], target: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key in tensors.keys() & changes.keys():
        weight, delta = tensors[key], changes[key]()
        if not weight.is_floating_point():
            raise AdapterFileError(f"{path}: {key} has type {weight.dtype}: a quantised base cannot be merged into.")
        if weight.flatten(1).shape != delta.shape:
            raise AdapterFileError(f"{path}: {key} has shape {tuple(weight.shape)}, its change {tuple(delta.shape)}.")
        tensors[key] = (weight.float() + delta.view(weight.shape)).to(weight.dtype)
        if not torch.isfinite(tensors[key].float()).all():
            raise AdapterFileError(f"{path}: {key} would have entries that are not finite.")
    try:
        save_file(tensors, target, metadata)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(f"{target}: cannot be written ({error}).") from None
    shutil.copymode(path, target)


def pipeline_class(base: Path) -> str | None:
    """The class that a base's `model_index.json` names."""
    try:
        return json.loads((base / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
