"""Adapters from wherever the command line's names point: S2FT files, folders, and what PEFT saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .base_files import base_folder, weight_shapes
from .lora_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME
from .reading import METADATA_KEY, Adapter, AdapterFileError

Source = str | os.PathLike


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
    return read_any_adapter(find_adapter_file(source))


def is_s2ft(source: Source) -> bool:
    """Whether a source is an S2FT adapter (of a FourierFT one, PEFT's): if not, it may be a LoRA."""
    from .extract import is_fourierft

    path = Path(source)
    if path.is_dir():
        from ..pipelines.sources import WEIGHTS_NAME

        return (path / WEIGHTS_NAME).is_file() or _peft_type(path) == "S2FT" or is_fourierft(path)
    if path.name == PEFT_WEIGHTS_NAME and _peft_type(path.parent) == "S2FT":
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _peft_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / PEFT_CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None


def layer_shapes(adapter: Adapter) -> dict[str, dict[str, tuple[int, int]]]:
    """The layers' shapes (d, k) by component."""
    return {c: {name: layer.shape for name, layer in layers.items()} for c, layers in adapter.layers.items()}
