"""Adapters for other tools: one as a LoRA, or two merged into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from s2ft_diffusion import toybox
from s2ft_diffusion.adapters import convert
from s2ft_diffusion.adapters.file import AdapterFileError, read_adapter
from s2ft_diffusion.adapters.weights import GridWeights

from .library import Entry, plain
from .limits import RequestError

TOOLS = {"ComfyUI": "comfyui", "A1111, Forge": "kohya", "diffusers": "lora"}
ERROR = 0.02  # relative, of an adapter at free positions, which no LoRA of a small rank holds exactly


def export(parts: Sequence[tuple[Entry, float]], tool: str, base: str, folder: Path, name: str) -> tuple[Path, str]:
    """Write adapters times their strengths as one LoRA; returns its file and what to say of it.

    On a grid the LoRA is exact but for its numbers' type. Raises RequestError for a tool that is none, and for what the
    tool has no names for.
    """
    if tool not in TOOLS:
        raise RequestError(f"The tool must be one of {', '.join(TOOLS)}.")
    location = toybox.resolve(base)
    out = folder / f"{name}-{TOOLS[tool]}.safetensors"
    try:
        written = convert.add(
            [(entry.path, strength) for entry, strength in parts],
            out,
            to=TOOLS[tool],
            error=None if all(_on_grids(entry.path) for entry, _ in parts) else ERROR,
            base=location if Path(location).is_dir() else None,
        )
    except (AdapterFileError, ValueError, OSError) as error:
        raise RequestError(f"It cannot be exported: {plain(str(error), *(entry.path for entry, _ in parts))}") from None
    low, high = written.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return out, f"{out.name}: {written.bytes / 1e6:.1f} MB, {rank}, relative error {written.relative_error:.1g}"


def _on_grids(path: Path) -> bool:
    layers = [layer for component in read_adapter(path).layers.values() for layer in component.values()]
    return all(isinstance(layer, GridWeights) for layer in layers)
